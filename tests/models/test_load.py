"""Finding a model by what a user types."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from meshwright.errors import InputError
from meshwright.models import catalogue, load
from meshwright.models import load as load_function
from meshwright.models.load import CATALOGUE_FOLDER


@pytest.mark.parametrize("typed", ["llama-3.1-70b", "LLAMA-3.1-70B", " llama-3.1-70b ", "llama3.1-70b"])
def test_names_and_aliases_are_found_in_any_case(typed: str) -> None:
    assert load(typed).name == "llama-3.1-70b"


def test_hub_ids_of_the_catalogue_need_no_network() -> None:
    assert load("meta-llama/Meta-Llama-3.1-70B").name == "llama-3.1-70b"
    assert load("deepseek-ai/deepseek-v3").name == "deepseek-v3"


def test_the_names_of_the_issue_are_there() -> None:
    for name in ("llama-3.1-70b", "gpt3-175b", "deepseek-v3", "mixtral-8x7b", "qwen3-235b-a22b", "llama-3.1-405b"):
        assert load(name).parameters > 1e10
    assert len(catalogue()) >= 100


def test_every_entry_has_a_file_a_source_and_no_file_is_orphaned() -> None:
    files = [e.file for e in catalogue()]
    assert sorted(files) == sorted(p.name for p in CATALOGUE_FOLDER.glob("*.json"))
    assert len(set(files)) == len(files)
    assert all(e.source and e.name == e.name.lower() for e in catalogue())
    keys = [key.lower() for e in catalogue() for key in (e.name, *e.aliases, *e.hub_ids)]
    assert len(set(keys)) == len(keys)


def test_a_path_to_a_config_or_its_folder_is_read(tmp_path: Path) -> None:
    config = json.loads((CATALOGUE_FOLDER / "qwen3-8b.json").read_text())
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    expected = load("qwen3-8b").parameters
    for path in (folder, folder / "config.json", str(folder), str(folder / "config.json")):
        model = load(path)
        assert (model.name, model.parameters) == ("my-model", expected)


def test_a_folder_named_like_a_hub_id_wins_over_the_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "deepseek-ai" / "DeepSeek-V3"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text((CATALOGUE_FOLDER / "qwen3-8b.json").read_text())
    monkeypatch.chdir(tmp_path)
    assert load("deepseek-ai/DeepSeek-V3").model_type == "qwen3"


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown model 'lama-3.1-70b' \(did you mean llama-3.1-70b"):
        load("lama-3.1-70b")
    with pytest.raises(InputError, match="meshwright models"):
        load("zzzzzzzzzzzzz")


@pytest.mark.parametrize(
    "typed", ["", "  ", "no/such/folder", "missing.json", "a\0b", "x" * 5000, "~nobody-here/x", "../..", "/", "~"]
)
def test_what_is_no_model_is_one_line(typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError) as caught:
        load(typed)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_hub_id_without_the_hub_client_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install huggingface_hub"):
        load_function("some-org/some-model")


def test_a_hub_id_is_downloaded_with_the_hub_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Hub:
        @staticmethod
        def hf_hub_download(hub_id: str, name: str) -> str:
            if hub_id == "some-org/missing":
                raise OSError("404: no such repository\nand a second line")
            assert (hub_id, name) == ("some-org/some-model", "config.json")
            return str(CATALOGUE_FOLDER / "qwen3-8b.json")

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    assert load("some-org/some-model").name == "some-org/some-model"
    with pytest.raises(InputError, match="404: no such repository") as caught:
        load("some-org/missing")
    assert "\n" not in str(caught.value)


def test_importing_and_loading_one_model_is_fast_and_reads_no_other_config() -> None:
    script = """
import time, numpy, meshwright.layout, pathlib
read = []
real = pathlib.Path.read_text
pathlib.Path.read_text = lambda self, *a, **k: (read.append(self.name), real(self, *a, **k))[1]
start = time.process_time()
import meshwright.models
model = meshwright.models.load("deepseek-v3")
print(time.process_time() - start, sorted(read), "torch" in __import__("sys").modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    seconds, rest = done.stdout.split(" ", 1)
    assert rest.strip() == "['deepseek-v3.json', 'index.toml'] False"
    assert float(seconds) < 0.5  # 0.05 s on an idle core; the bound allows for busy ones
