"""TRL's DPO trainer as we use it: tokenised pairs in a fixed order, the start's log-probabilities taken once.

One idea: the reference is the start itself, asked before the first step about each pair (not about each of its uses) and
written beside the checkpoints; so one model is in memory, and carrying on asks nothing again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from mixmerge.kept import keep, kept
from mixmerge.train import group
from mixmerge.train.adapter import adapter_config
from mixmerge.train.fit import Place
from mixmerge.train.settings import DpoSettings
from mixmerge.train.tokens import BLANK, TokenisedPairs
from mixmerge.train.trainer import Watched, blanks_of, by_length, callbacks, padding, trainer_arguments, watch

REFERENCE = "reference"
TRAINED = "the pairs trained on"  # no language is called so
MEANS = ("rewards/", "logps/")  # what TRL's names of means over the pairs of a step begin with
HELD = {"loss": "", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}  # measure -> TRL's name


def build_trainer(
    model: Any,
    tokenizer: Any,
    tokens: TokenisedPairs,
    order: Sequence[int],
    settings: DpoSettings,
    *,
    place: Place,
    training: str,
    held: Mapping[str, TokenisedPairs] | None = None,
) -> PairTrainer:
    """A trainer over tokenised pairs in their training order; `training` is its identity, `held` its held-out pairs."""
    own = {
        "beta": settings.beta,
        "loss_type": [settings.loss],
        "label_smoothing": settings.label_smoothing,
        "precompute_ref_log_probs": True,
    }
    blanks = blanks_of(order, settings)
    rows = [*order, *[len(tokens.kept)] * blanks]
    trainer = PairTrainer(
        model=model,
        args=trainer_arguments(DPOConfig, settings, len(order), place, own),
        train_dataset=tokens.dataset(rows),
        processing_class=tokenizer,
        data_collator=DataCollatorForPreference(pad_token_id=padding(tokenizer)),
        callbacks=callbacks(place),
        peft_config=None if settings.adapter is None else adapter_config(settings.adapter),
        reference=Reference({TRAINED: tokens, **(held or {})}, rows, place.work, training),
    )
    return watch(trainer, training, held, place, blanks)


class Reference:
    """The start's log-probabilities of the two answers of every pair: float32 (pairs, 2) for those trained on and for each
    language's held-out ones; from a file in `folder` if they are there.
    """

    def __init__(self, pairs: Mapping[str, TokenisedPairs], order: Sequence[int], folder: Path, training: str) -> None:
        self.pairs, self.order, self.folder, self.name = pairs, order, folder, f"{REFERENCE}-{training[:16]}"
        self.logps = self._read()

    def fill(self, ask: Callable[[TokenisedPairs], Any]) -> None:
        """Ask for what the file did not have, and keep it there; the file appears whole."""
        if self.logps:
            return
        self.logps |= {name: ask(pairs) for name, pairs in self.pairs.items()}
        if not group.first():
            return

        def write(file: Path) -> None:
            with file.open("wb") as stream:
                np.savez(stream, **{f"of {name}": logps for name, logps in self.logps.items()})

        keep(self.folder, self.name, ".npz", write)

    def dataset(self, name: str, order: Sequence[int]) -> Referenced:
        """The pairs of this name in this order, with their reference, which has to be there once they are read."""
        return Referenced(self.pairs[name].dataset(order), name, order, self.logps)

    def _read(self) -> dict[str, Any]:
        """What an earlier call of this very training wrote, or nothing."""
        file = kept(self.folder, self.name, ".npz")
        if file is None:
            return {}
        with suppress(FileNotFoundError), np.load(file, allow_pickle=False) as held:  # another process has removed it
            return {name: held[f"of {name}"] for name in self.pairs}
        return {}


class Referenced(Dataset[dict[str, Any]]):
    """Pairs with the start's log-probabilities of their answers, `ref_chosen_logps` and `ref_rejected_logps`; 0 of a blank one."""

    def __init__(self, rows: Any, name: str, order: Sequence[int], logps: Mapping[str, Any]) -> None:
        self.rows, self.name, self.order, self.logps = rows, name, order, logps

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> dict[str, Any]:
        known, pair = self.logps[self.name], self.order[at]
        chosen, rejected = known[pair] if pair < len(known) else (0.0, 0.0)
        return {**self.rows[at], "ref_chosen_logps": float(chosen), "ref_rejected_logps": float(rejected)}


class PairTrainer(Watched, DPOTrainer):  # type: ignore[misc]
    """`DPOTrainer` over pairs that are tokenised and ordered already, with their reference kept."""

    blank_tokens = 2 * BLANK

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

    def measure(self, lang: str, rows: TokenisedPairs) -> dict[str, float]:
        """Means over the pairs: the loss, the margin of the rewards, and the share whose chosen answer has the larger one."""
        sums = np.zeros(len(HELD))
        for own, batch in self.batches(self.reference.dataset(lang, by_length(rows))):
            loss = float(self.compute_loss(self.model, batch))
            told = [self._metrics["eval"][source][-1] if source else loss for source in HELD.values()]
            sums += len(own) * np.array(told)
        return dict(zip(HELD, (group.total_of_floats(sums) / len(rows.kept)).tolist(), strict=True))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Mean loss of the pairs; over processes, of those of all of them."""
        loss: torch.Tensor = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        last = self.blanks > 0 and self.model.training and self.state.global_step == self.state.max_steps - 1
        return self._without_blanks(loss, inputs) if last else loss

    def _without_blanks(self, loss: torch.Tensor, inputs: Any) -> torch.Tensor:
        """The loss and the means of a part of a batch as they are over its true pairs alone, in all processes.

        A blank pair has log-ratios of 0: no gradient, no reward, and a loss that is the same for all.
        """
        pairs = inputs["completion_mask"].shape[0] // 2
        true = int(inputs["completion_mask"][:pairs].any(dim=1).sum())
        everywhere, at_all = group.total([true, pairs])
        if everywhere == at_all:
            return loss
        for name, values in self._metrics["train"].items():
            if name.startswith(MEANS):
                values[-1] *= at_all / everywhere
        self.model.eval()
        blank = self.reference.dataset(TRAINED, self.reference.order[-1:])[0]
        with torch.no_grad():
            empty = super().compute_loss(self.model, self._prepare_inputs(self.data_collator([blank])))
        self.model.train()
        self._metrics["eval"].clear()
        mean: torch.Tensor = (loss - empty * (pairs - true) / pairs) * (at_all / everywhere)
        return mean

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """The dataset with `ref_chosen_logps` and `ref_rejected_logps`, which are asked for once the training begins."""
        return self.reference.dataset(TRAINED, self.reference.order)

    def can_carry_on(self) -> bool:
        """Whether the reference is there: a model that has been trained a while cannot be asked for it."""
        return bool(self.reference.logps)

    def read_start(self) -> None:
        """Take the reference, if it is not there."""
        self.reference.fill(self._ask)

    def _ask(self, pairs: TokenisedPairs) -> Any:
        """Log-probabilities under the start of the chosen and the rejected answers: float32 (pairs, 2)."""
        ranked, logps = by_length(pairs), np.zeros((len(pairs.kept), 2))
        training = self.model.training
        self.model.eval()
        for own, batch in self.batches(pairs.dataset(ranked)):
            sides = self.compute_ref_log_probs(self.model, batch)
            logps[[ranked[at] for at in own]] = torch.stack(sides, dim=1).float().cpu().numpy()[: len(own)]
        self.model.train(training)
        return group.total_of_floats(logps).astype(np.float32)
