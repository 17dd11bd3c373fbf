"""The engine behind an address: any OpenAI-compatible server, through the client, which keeps what was answered.

The one idea: a server batches by itself, so it gets as many prompts at once as there are, and the client finds how many of
them it takes at a time. A prompt that the server says is too long, or that its filter keeps, is a row and not a failure; a
server that can answer nothing is one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixmerge.errors import ModelError, reason
from mixmerge.evaluate.client import Answer, Client
from mixmerge.evaluate.engine import Completion, Finish, GenerationSettings

# vLLM, llama-server, SGLang, TGI and OpenAI, in the bodies of their 400s
TOO_LONG = re.compile(
    r"context_length_exceeded|(maximum|available|exceeds?)[^.]{0,60}context|context[^.]{0,40}(length|size|window)"
    r"|longer than the maximum|input length|too (long|many tokens)|max_model_len|max_new_tokens` must be <=",
    re.IGNORECASE,
)
FINISH: Mapping[str, Finish] = {"length": "length", "max_tokens": "length", "content_filter": "filtered"}


class ServerEngine:
    """A model that a server serves under a name.

    Args:
        client: of the server's address or addresses. It stays the caller's, who closes it.
        model: the name in the requests; a server that was started for a folder mostly calls it by its path.
        folder: the model's folder, where it is known: its tokenizer and chat template measure prompts.
        context: the most tokens of prompt and response, where the folder is known; None: what its config.json says.
            Without a folder, or where a server is set to fewer, the server says so itself, prompt by prompt.
        extra: further keys of every request, such as {"chat_template_kwargs": {"enable_thinking": False}}.
    """

    def __init__(
        self,
        client: Client,
        model: str,
        *,
        folder: Path | None = None,
        context: int | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        if context is not None and folder is None:
            raise ValueError("a context counts tokens, which needs the model's folder")
        self.context = _context(folder) if context is None and folder is not None else context
        self._client, self._model, self._extra = client, model, dict(extra or {})
        self._tokenizer = None if folder is None else _tokenizer(folder)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens with the chat template where the folder is known; else UTF-8 bytes, which only say what is longer."""
        if self._tokenizer is None:
            return [len(text.encode("utf-8", "replace")) for text in texts]
        return [
            len(
                self._tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
                )["input_ids"]
            )
            for text in texts
        ]

    def fits(self, rows: int, length: int, settings: GenerationSettings) -> bool:
        return True  # what is under way at once is the client's to find

    def batch_cost(self, settings: GenerationSettings) -> int | None:
        return None  # it does not pad, and a batch's last answers leave it idle

    def complete(self, texts: Sequence[str], settings: GenerationSettings) -> list[Completion]:
        """One completion a prompt.

        Raises:
            ServerError, BudgetError, UserError: as the client.
            ModelError: none of the prompts was answered, and not because they are too long.
        """
        answers = self._client.ask([self.body(text, settings) for text in texts])
        found = [_completion(answer) for answer in answers]
        if found and all(completion.finish == "unanswered" for completion in found):
            raise ModelError(f"the server answers none of {len(found)} prompts: {found[0].reason}", where=self._model)
        return found

    def body(self, text: str, settings: GenerationSettings) -> dict[str, Any]:
        """The request for one prompt; a sample's seed belongs to its prompt."""
        sampled = {"top_p": settings.top_p, "seed": settings.seed_of(text)} if settings.temperature else {}
        return {
            "model": self._model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            **sampled,
            **self._extra,
        }


def _completion(answer: Answer) -> Completion:
    finish = FINISH.get(answer.finish, "stop")
    if answer.error is None and finish != "filtered":
        # a server that does not count tokens is not guessed at: what it said is at least one, if it said anything
        tokens = answer.completion_tokens if answer.completion_tokens is not None else int(bool(answer.text))
        return Completion(answer.text, tokens, finish)
    if finish == "filtered":
        return Completion("", 0, "filtered", answer.error or "content filter")
    said = answer.error or "no reason given"
    return Completion("", 0, "too_long" if TOO_LONG.search(said) else "unanswered", said)


def _context(folder: Path) -> int | None:
    """The most tokens that a model folder's configuration names."""
    place = folder / "config.json"
    try:
        config = json.loads(place.read_bytes())
        found = config.get("text_config", config).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"cannot be read: {reason(error)}", where=str(place)) from error
    return found if isinstance(found, int) else None


def _tokenizer(folder: Path) -> Any:
    from mixmerge.model.loading import load_pretrained

    tokenizer = load_pretrained("AutoTokenizer", folder)
    if not tokenizer.chat_template:
        raise ModelError(
            "the tokenizer has no chat template", where=str(folder), do="set `chat_template:` for the base"
        )
    return tokenizer
