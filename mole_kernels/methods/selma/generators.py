"""What writes prompts: any object with `name` and `write(request, number, seed)`; here a local transformers
model and a file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from mole_kernels.errors import MoleError, MoleFileError, MoleStateError, printable
from mole_kernels.files.text import read_text, text_lines
from mole_kernels.methods.selma.prompt_text import clean_prompt


class UnusableAnswer(MoleError, RuntimeError):
    """No answer, or one that cannot be used, where asking again may help; `wait` is how many seconds the
    other side asked for.
    """

    wait: float = 0.0


class TextGenerator(Protocol):
    """Writes text.

    Attributes:
        name: What is recorded with each request; no secrets.
        write: The answer to a request. `number` counts what this writer was asked before for a skill,
            from 0; `seed` differs from attempt to attempt; both are the same again after a restart.
            Raises UnusableAnswer where another attempt may help, any other MoleError where it will not.
    """

    name: str

    def write(self, request: str, number: int, seed: int) -> str: ...


class TransformersText:
    """A causal language model of transformers on this machine; samples at `temperature`, chats where its
    tokenizer has a template.

    Args:
        model: What `AutoModelForCausalLM` gives; `TransformersText.load` takes a folder or a hub name.
        tokenizer: What `AutoTokenizer` gives.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, name: str, temperature: float = 1.0, max_new_tokens: int = 1024
    ) -> None:
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.temperature, self.max_new_tokens = temperature, max_new_tokens

    @classmethod
    def load(
        cls, source: str, *, device: str | None = None, dtype: torch.dtype | None = None, **options: Any
    ) -> TransformersText:
        """From safetensors only, in the dtype it was saved in unless told otherwise."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            model: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype or "auto", use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise MoleFileError(
                printable(source, 300), f"is no language model that can be read ({printable(error, 400)})"
            ) from error
        return cls(
            model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")),
            tokenizer,
            name=f"local {source}",
            **options,
        )

    def write(self, request: str, number: int, seed: int) -> str:
        text, templated = request, bool(getattr(self.tokenizer, "chat_template", None))
        if templated:
            messages = [{"role": "user", "content": request}]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        answer, cut = self._sample(text, seed, special_tokens=not templated)
        return without_last_line(answer) if cut else answer

    @torch.no_grad()
    def _sample(self, text: str, seed: int, special_tokens: bool = True) -> tuple[str, bool]:
        """The continuation of a text, and whether the limit cut it off; the process's own random state stays
        as it is.
        """
        inputs = self.tokenizer(text, return_tensors="pt", add_special_tokens=special_tokens).to(
            self.model.device
        )
        begin, pad = inputs["input_ids"].shape[1], self.tokenizer.pad_token_id
        options = {
            "do_sample": True,
            "temperature": self.temperature,
            "top_k": 0,
            "max_new_tokens": self.max_new_tokens,
        }
        with torch.random.fork_rng(devices=[self.model.device] if self.model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            out = self.model.generate(
                **inputs, **options, pad_token_id=self.tokenizer.eos_token_id if pad is None else pad
            )
        return self.tokenizer.decode(out[0, begin:], skip_special_tokens=True), len(
            out[0]
        ) - begin >= self.max_new_tokens


class FileText:
    """Prompts of a text file, one to a line, handed out in order, as many to an answer as `batch` says.

    The text of the request decides nothing, its number everything: a restart goes on where it stopped.
    """

    def __init__(self, path: str | Path, *, batch: int = 20) -> None:
        self.path, self.batch, self.name = Path(path), batch, f"file {Path(path).name}"
        text = read_text(path).removeprefix("\ufeff").replace("\r", "\n")
        self.lines = [prompt for line in text_lines(text) if (prompt := clean_prompt(line)) is not None]
        if not self.lines:
            raise MoleFileError(
                printable(path, 300), expected="a prompt on each line", got="no prompt at all"
            )

    def write(self, request: str, number: int, seed: int) -> str:
        part = self.lines[number * self.batch : (number + 1) * self.batch]
        if not part:
            hint = "ask for fewer, or give a longer file"
            raise MoleStateError(
                printable(self.path, 300), f"all its {len(self.lines)} prompts have been read", hint=hint
            )
        return "\n".join(f"{i}. {line}" for i, line in enumerate(part, 1))


def without_last_line(text: str) -> str:
    """A text cut off by a limit of tokens, without the line that the limit fell into."""
    return text.rstrip("\n").rpartition("\n")[0]
