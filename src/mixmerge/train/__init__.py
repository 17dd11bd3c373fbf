"""Training a base on a mixture. `sft` is light to import; `trainer` brings torch, transformers and trl."""
