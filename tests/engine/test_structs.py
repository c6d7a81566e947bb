"""The model runner's side of the engine imports and works where msgspec and zmq are missing."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys

for name in ("msgspec", "zmq", "fastapi", "sqlalchemy", "pydantic", "jinja2", "tokenizers"):
    sys.modules[name] = None
import loraplex.engine.bench, loraplex.engine.gpu.runner, loraplex.kernels.bench
from loraplex.engine.api import AdapterUse, GenerationRequest, SamplingParams, TokenLogprobs

one, two = SamplingParams(temperature=0.5), SamplingParams(temperature=0.5)
assert one == two and one.logit_bias == {} and one.logit_bias is not two.logit_bias
use = AdapterUse("d", 2.0)
assert {use: 1}[AdapterUse("d", 2.0)] == 1
request = GenerationRequest(request_id="r", prompt_token_ids=[1], sampling=one, adapters=(use,))
assert request.adapters[0].weight == 2.0
try:
    request.request_id = "s"
except AttributeError:
    print("frozen")
"""


def test_a_bare_gpu_machine_can_run_the_runner() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "frozen\n"
