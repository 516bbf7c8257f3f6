"""How a serving row's words and gaps are read: formats of weights and cache, and how many requests were sent.

In: fields of a row. Out: formats and counts, with a note of what was assumed.
"""

from __future__ import annotations

from meshwright.hardware.spec import Accelerator
from meshwright.layout.config import Precision
from meshwright.models.fields import Fields
from meshwright.validation.skip import SkippedError

WEIGHT_ONLY = {
    # stored bits of a weight, with its share of the scales, where products run in 16 bits
    "int8": (Precision.BF16, 1.0),
    "int4": (Precision.BF16, 0.5 + 4.0 / 32),  # groups of 32 with a 16-bit scale and zero point (gpt-fast)
}
MXFP4_BYTES = 0.5 + 1.0 / 32  # an 8-bit scale per 32 elements (OCP Microscaling 1.0)
RELEASED_IN_MXFP4 = "gpt-oss"
"""Models whose weights exist in MXFP4 only (OpenAI 2025, model card of gpt-oss, section 2.1). Rows name the format that
the device computes in."""
EIGHT_BIT_CACHE = frozenset({Precision.FP8, Precision.MXFP8, Precision.NVFP4})
"""Products of these formats are served with an fp8 cache where the source does not say (ModelOpt's recipes)."""

REQUESTS = {
    # prompt and answer in tokens -> requests of one run
    (128, 128): 30000,
    (128, 2048): 3000,
    (128, 4096): 1500,
    (500, 2000): 3000,
    (1000, 1000): 3000,
    (1000, 2000): 1500,
    (1024, 1024): 3000,
    (1024, 8192): 1500,
    (1024, 32768): 1000,
    (2048, 128): 3000,
    (2048, 2048): 1500,
    (5000, 500): 1500,
    (8192, 1024): 1500,
    (20000, 2000): 1000,
    (32768, 1024): 1000,
}
"""What TensorRT-LLM's performance overview says it sends, all at once and all of one length ("Preparing a Dataset",
releases 1.0 and 1.2; taken to hold for the releases before)."""


def formats(row: Fields, accelerator: Accelerator) -> tuple[Precision, float | None]:
    """Format of the products, and bytes of a stored weight where they differ. Tensor cores that apply block scales
    multiply MXFP4 weights with MXFP8 activations; for others they are dequantised to 16 bits."""
    word = row.text("precision").lower()
    model = row.section("model")
    if word == "fp4" or (model is not None and RELEASED_IN_MXFP4 in model.text("name").lower()):
        scaled = Precision.NVFP4 in accelerator.peak_flops
        return (Precision.MXFP8 if scaled else Precision.BF16), MXFP4_BYTES
    if word in WEIGHT_ONLY:
        return WEIGHT_ONLY[word]
    if word not in tuple(Precision):
        raise SkippedError(f"precision {word[:40] or 'null'} is not known")
    return Precision(word), None


def requests(row: Fields, prompt: int, output: int, assumed: list[str]) -> int | None:
    """How many were sent, None where nobody says: then the engine is taken to be busy without end."""
    stated = row.whole("num_requests")
    if stated is not None or "tensorrt-llm" not in row.text("framework").lower():
        return stated
    found = REQUESTS.get((prompt, output))
    if found is not None:
        assumed.append(f"{found} requests")
    return found
