"""A small HTTP server that stands for vLLM in tests of client and launcher: `fake_vllm.py serve MODEL --host ...`.

It answers /health and streamed or whole /v1/completions with (sum of prompt + i) % 97 as token i, prints the lines that
vLLM prints, starts one child of its own, and fails as vLLM does where the model's name asks for it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN_S = 0.002


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["prompt"] == [0]:
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b'{"error": "no such prompt"}')
            return
        tokens = [(sum(asked["prompt"]) + i) % 97 for i in range(asked["max_tokens"])]
        self.send_response(200)
        self.end_headers()
        if not asked["stream"]:
            self.wfile.write(json.dumps({"choices": [{"token_ids": tokens}]}).encode())
            return
        for token in tokens:
            time.sleep(TOKEN_S)
            self.wfile.write(f"data: {json.dumps({'choices': [{'token_ids': [token]}]})}\n\n".encode())
        if asked["prompt"] != [1]:
            self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


class Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that leave are part of the tests."""


def main(words: list[str]) -> int:
    model = words[1]
    options = dict(zip(words[2::2], words[3::2], strict=False))
    if model.endswith("too-big"):
        print("(EngineCore pid=7) ValueError: No available memory for the cache blocks.", flush=True)
        return 1
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    for rank in range(2):
        print(f"(Worker pid={100 + rank}) INFO world_size=2 rank={rank} local_rank={rank} backend=gloo")
        print(f"(Worker_TP{rank} pid={100 + rank}) INFO loaded")
    print(
        "(EngineCore pid=9) INFO CPU KV cache size: 4,096 tokens, Maximum concurrency for 64 tokens per request: 64.00x"
    )
    sys.stdout.flush()
    server = Quiet((options["--host"], int(options["--port"])), Handler)

    def stop(*_: object) -> None:
        if not model.endswith("stubborn"):
            child.kill()
            raise SystemExit(0)

    signal.signal(signal.SIGINT, stop)
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
