"""Options of TRL that have no word of ours: any other field of SFTConfig or DPOConfig, by its own name.

One idea: a field is either ours (another key of the recipe says it, or the contract of a step needs it as it is) or the
user's; never both, and never a misspelt one that is silently dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from mixmerge.errors import UserError, did_you_mean, reason

# TRL's field -> the key that says it here.
WORDS = {
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "scheduler",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "max_length": "max_length",
    "warmup_steps": "warmup_ratio",
    "warmup_ratio": "warmup_ratio",
    "weight_decay": "weight_decay",
    "bf16": "precision",
    "fp16": "precision",
    "seed": "seed",
    "gradient_accumulation_steps": "gradient_accumulation",
    "optim": "optimizer",
    "adam_beta1": "adam_betas",
    "adam_beta2": "adam_betas",
    "adam_epsilon": "adam_epsilon",
    "max_grad_norm": "max_grad_norm",
    "neftune_noise_alpha": "neftune_alpha",
    "padding_free": "padding_free",
    "packing": "padding_free",
    "assistant_only_loss": "train_on",
    "beta": "beta",
    "loss_weights": "loss",
    "label_smoothing": "label_smoothing",
    "gradient_checkpointing": "how.gradient_checkpointing",
    "use_cpu": "how.device",
    "dtype": "save_dtype",
    "report_to": "how.report_to",
}
# What a step's folder, its checkpoints, its order of rows or its loss rest on.
OURS = {
    *(
        "output_dir",
        "overwrite_output_dir",
        "logging_steps",
        "logging_strategy",
        "logging_nan_inf_filter",
        "disable_tqdm",
    ),
    *(
        "resume_from_checkpoint",
        "load_best_model_at_end",
        "restore_callback_states_from_checkpoint",
        "ignore_data_skip",
    ),
    *("max_steps", "dataset_kwargs", "remove_unused_columns", "precompute_ref_log_probs", "sync_ref_model"),
    *("per_device_eval_batch_size", "auto_find_batch_size", "completion_only_loss", "packing_strategy"),
    *("model_init_kwargs", "trust_remote_code", "dataset_text_field", "truncation_mode", "pad_to_multiple_of"),
    *(
        "train_sampling_strategy",
        "group_by_length",
        "data_seed",
        "label_smoothing_factor",
        "deepspeed",
        "fsdp",
        "fsdp_config",
    ),
    *(
        "chat_template_path",
        "eos_token",
        "pad_token",
        "logging_dir",
        "run_name",
        "accelerator_config",
        "parallelism_config",
    ),
    *("label_names", "do_train", "do_eval", "do_predict", "use_liger_kernel", "liger_kernel_config"),
}
PREFIXES = ("save_", "hub_", "push_", "eval_", "dataloader_", "ddp_", "batch_eval_", "include_", "trackio_")


def check_extra(method: str, extra: Mapping[str, Any]) -> None:
    """Refuse an option that TRL does not have, or that is not the user's to set.

    Raises:
        UserError: names the option, and the key or the option that was probably meant.
    """
    if not extra:
        return
    from trl import DPOConfig, SFTConfig

    known = {field.name for field in dataclasses.fields(SFTConfig if method == "sft" else DPOConfig) if field.init}
    words = WORDS | ({"loss_type": "loss"} if method == "dpo" else {})
    free = {name for name in known if name not in words and name not in OURS and not name.startswith(PREFIXES)}
    for name in extra:
        where = f"training.extra.{name}"
        if name in words:
            raise UserError("this has a word of its own", where=where, do=f"set {words[name]}")
        if name in known and name not in free:
            raise UserError(
                "this is not free: a step's folder, order or loss rests on it", where=where, do="leave it out"
            )
        if name not in known:
            raise UserError(f"TRL has no such option for {method}", where=where, do=did_you_mean(name, free))


def with_extra(kind: Callable[..., Any], extra: Mapping[str, Any], **ours: Any) -> Any:
    """TRL's arguments from our own and the user's.

    Raises:
        UserError: TRL refuses the user's values; says why.
    """
    try:
        return kind(**ours, **extra)
    except (TypeError, ValueError) as error:
        if not extra:
            raise
        raise UserError(f"TRL refuses these options: {reason(error)}", where="training.extra") from error
