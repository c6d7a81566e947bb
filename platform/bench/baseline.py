"""The same workload by transformers and peft in this process: what one would do without a server.

A program of its own (`python -m loraplex.platform.bench.baseline --model DIR [--adapters DIR
...]`), since it imports torch. It reads one JSON case a line on stdin and answers each with one
JSON line on stdout, so that the comparison can take turns with the server round by round without
loading anything twice.

Modes: `static` = `generate` on full batches, no adapter. `mixed` = the same with peft's
`adapter_names`, one adapter per row. `sequential` = one request at a time with `set_adapter`.
Prompts of a batch have equal length, so nothing is padded: the kindest case for a static batch. A
request's clock starts when its batch does.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

from loraplex.platform.bench import workload
from loraplex.platform.bench.measure import RequestRecord, summarize

MODES = ("static", "mixed", "sequential")
WARM_TOKENS = 4


class TokenClock(transformers.StoppingCriteria):  # type: ignore[misc]
    """Notes the time of every decoding step; never stops anything."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Baseline:
    def __init__(self, model: Path, adapters: Sequence[Path], dtype: str = "auto") -> None:
        self.base = self._load(model, dtype)
        self.vocab_size = int(self.base.config.vocab_size)
        self.names = [folder.name for folder in adapters]
        self.peft: Any = None
        if adapters:
            # peft changes the model that it wraps; a copy keeps the base path clean.
            self.peft = PeftModel.from_pretrained(
                self._load(model, dtype), str(adapters[0]), adapter_name=self.names[0]
            )
            for folder in adapters[1:]:
                self.peft.load_adapter(str(folder), folder.name)
            self.peft.eval()
        self._warm: set[tuple[str, int]] = set()

    @staticmethod
    def _load(model: Path, dtype: str) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(str(model), dtype=dtype).eval()

    def run(self, case: dict[str, Any]) -> dict[str, Any]:
        """case: mode, popularity, concurrency, num_requests, prompt_len, output_len, seed. Returns
        the result line.

        Raises: ValueError when the mode needs adapters and none were given.
        """
        mode, batch = case["mode"], int(case["concurrency"])
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")
        if mode != "static" and self.peft is None:
            raise ValueError(f"mode {mode!r} needs adapters: give --adapters")
        if mode == "sequential":
            batch = 1
        popularity = "base" if mode == "static" else case.get("popularity", "distinct")
        plan = workload.punica(
            popularity,
            case["num_requests"],
            len(self.names),
            case["prompt_len"],
            case["output_len"],
        )
        prompts = workload.prompts(plan, self.vocab_size, case.get("seed", 0))
        if (mode, batch) not in self._warm:
            self._warm.add((mode, batch))
            for _ in self._generate(mode, plan[:batch], prompts[:batch], WARM_TOKENS):
                pass
        records: list[RequestRecord] = []
        for first in range(0, len(plan), batch):
            rows = slice(first, first + batch)
            records += self._generate(mode, plan[rows], prompts[rows], case["output_len"])
        return {
            "system": f"transformers+peft {mode}" if mode != "static" else "transformers static",
            "mode": mode,
            "popularity": popularity,
            "concurrency": batch,
            "prompt_len": case["prompt_len"],
            "output_len": case["output_len"],
            **workload.describe(plan),
            **summarize(records).as_dict(),
        }

    @torch.inference_mode()
    def _generate(
        self,
        mode: str,
        plan: Sequence[workload.PlannedRequest],
        prompts: list[list[int]],
        length: int,
    ) -> Iterator[RequestRecord]:
        names = [None if p.adapter is None else self.names[p.adapter] for p in plan]
        model = self.base if mode == "static" else self.peft
        extra = {"adapter_names": names} if mode == "mixed" else {}
        if mode == "sequential":
            model.set_adapter(names[0])
        input_ids = torch.tensor(prompts)
        clock = TokenClock()
        start = time.perf_counter()
        model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=transformers.StoppingCriteriaList([clock]),
            **extra,
        )
        end = time.perf_counter()
        for name in names:
            yield RequestRecord(name, start, list(clock.times), length, end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, nargs="*", default=[])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    baseline = Baseline(args.model, args.adapters, args.dtype)
    print(json.dumps({"ready": True, "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        try:
            answer = baseline.run(json.loads(line))
        except ValueError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
