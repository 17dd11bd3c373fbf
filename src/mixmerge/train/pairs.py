"""TRL's DPO trainer as we use it: tokenised pairs in a fixed order, the start's log-probabilities taken once.

One idea: the reference is the start itself, asked before the first step about each pair (not about each of its uses) and
written beside the checkpoints; so one model is in memory, and carrying on asks nothing again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from mixmerge.train.adapter import adapter_config
from mixmerge.train.fit import Place
from mixmerge.train.settings import DpoSettings
from mixmerge.train.tokens import TokenisedPairs
from mixmerge.train.trainer import Watched, callbacks, padding, trainer_arguments, watch

REFERENCE = "reference.npz"


def build_trainer(
    model: Any,
    tokenizer: Any,
    tokens: TokenisedPairs,
    order: Sequence[int],
    settings: DpoSettings,
    *,
    place: Place,
    training: str,
) -> PairTrainer:
    """A trainer over tokenised pairs in their training order; `training` is its identity."""
    own = {
        "beta": settings.beta,
        "loss_type": [settings.loss],
        "label_smoothing": settings.label_smoothing,
        "precompute_ref_log_probs": True,
    }
    trainer = PairTrainer(
        model=model,
        args=trainer_arguments(DPOConfig, settings, len(order), place, own),
        train_dataset=tokens.dataset(order),
        processing_class=tokenizer,
        data_collator=DataCollatorForPreference(pad_token_id=padding(tokenizer)),
        callbacks=callbacks(place),
        peft_config=None if settings.adapter is None else adapter_config(settings.adapter),
        reference=Reference(tokens, order, place.work / REFERENCE, training),
    )
    return watch(trainer, training)


class Reference:
    """The start's log-probabilities of every pair's two answers: float32 (pairs, 2), from the file if it is there."""

    def __init__(self, tokens: TokenisedPairs, order: Sequence[int], file: Path, training: str) -> None:
        self.tokens, self.order, self.file, self.training = tokens, order, file, training

    def read(self) -> Any | None:
        """What an earlier call of this very training wrote, or None."""
        try:
            with np.load(BytesIO(self.file.read_bytes()), allow_pickle=False) as held:
                return held["logps"] if str(held["training"]) == self.training else None
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return None

    def write(self, logps: Any) -> None:
        """Keep them for the next call; the file appears whole."""
        partial = self.file.with_name(f"{REFERENCE}.part")
        with partial.open("wb") as stream:
            np.savez(stream, logps=logps, training=np.array(self.training))
        partial.replace(self.file)


class PairTrainer(Watched, DPOTrainer):  # type: ignore[misc]
    """`DPOTrainer` over pairs that are tokenised and ordered already, with their reference kept."""

    def __init__(self, *args: Any, reference: Reference, **kwargs: Any) -> None:
        self.reference = reference
        super().__init__(*args, **kwargs)
        if self.args.disable_dropout:
            # TRL turns off modules that drop out; attention, in most models, reads a rate of its own in training mode.
            for module in self.model.modules():
                if isinstance(getattr(module, "attention_dropout", None), float):
                    module.attention_dropout = 0.0

    def count(self, inputs: Any) -> Mapping[str, int]:
        return {
            "tokens": int(inputs["attention_mask"].sum()),
            "completion_tokens": int(inputs["completion_mask"].sum()),
        }

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """The dataset with `ref_chosen_logps` and `ref_rejected_logps`."""
        logps = self.reference.read()
        if logps is None:
            logps = self.reference_logps(self.reference.tokens, batch_size)
            self.reference.write(logps)
        return self.reference.tokens.dataset(self.reference.order, logps)

    def reference_logps(self, tokens: TokenisedPairs, batch_size: int) -> Any:
        """Log-probabilities under the start of the chosen and the rejected answers: float32 (pairs, 2)."""
        lengths = tokens.lengths
        ranked = sorted(range(len(lengths)), key=lambda row: lengths[row])  # like lengths share a batch
        pairs, found = tokens.dataset(ranked), np.empty((len(ranked), 2), np.float32)
        self.model.eval()
        for begin in range(0, len(ranked), batch_size):
            rows = ranked[begin : begin + batch_size]
            batch = self.data_collator([pairs[at] for at in range(begin, begin + len(rows))])
            sides = self.compute_ref_log_probs(self.model, self._prepare_inputs(batch))
            found[rows] = torch.stack(sides, dim=1).float().cpu().numpy()
        return found
