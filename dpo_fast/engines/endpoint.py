"""A deployed server: the log-probs that an OpenAI-compatible completions endpoint gives of token ids sent to it.

It scores sequences of token ids, and is no `Engine`: a server gives neither entropies nor mean logits, and numbers
put in their places would pass for measurements.

Two dialects are spoken::

    vllm     {"prompt": [ids], "prompt_logprobs": 2}               log-probs by token id, of vLLM
    openai   {"prompt": [ids], "echo": true, "logprobs": 2}        log-probs by the tokens' texts

Nothing that a server says is believed unchecked. It must list as many tokens as were sent, by their ids where it says
ids, and a probe finds log-probs that are given to the wrong tokens. Of a request's three sequences that differ in the
last token alone, the distribution that predicts it is the same::

    a b c [d]      what precedes the last token is a b c in all three: the top tokens and their log-probs agree.
    a b c [e]      A server that is off by one gives the distributions after d, e and f, which differ; or the
    a b c [f]      one that predicts c, and then all three last tokens have the same log-prob.
"""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from dpo_fast.engines.completions_server import CompletionsServer
from dpo_fast.errors import EngineOutputError, UsageError
from dpo_fast.text import one_line
from dpo_fast.types import Float32Array

Dialect = Literal["auto", "openai", "vllm"]
TOP = 2  # the most likely tokens that are asked for: with one, a text that two tokens share could pass for the top one
NOT_FINITE = -9999.0  # nats: what vLLM writes for minus infinity, which JSON cannot
ABOVE_ONE = 1e-3  # nats above 0 that rounding in half precision may leave
CHECK_IT = "check its version and settings, as it cannot be verified so"
PROBE_LENGTH = 8  # tokens before the one that the probe changes
# What three sequences of one batch, or of several, may differ by: bfloat16's noise between batch shapes.
PROBE_TOLERANCE = 0.1  # nats


@dataclass(frozen=True, slots=True)
class ServedTokens:
    """What a server says of one completion's C scored tokens.

    Attributes:
        log_probs: (C,) float32, nats: log p(token | what precedes it).
        is_top1: (C,) float32, 0 or 1: the server has no likelier token; None where it does not say for every token.
    """

    log_probs: Float32Array
    is_top1: Float32Array | None


@dataclass(frozen=True, slots=True)
class _Reply:
    """What a server says of one sequence, one entry a token.

    Attributes:
        log_probs: nats; None for the first token.
        tops: log-probs of the likeliest tokens and of the token itself, by the server's names of them.
        names: the server's name of the token itself.
    """

    log_probs: list[Any]
    tops: list[dict[str, float] | None]
    names: list[str]


class EndpointEngine:
    """A model on an OpenAI-compatible completions server that returns the log-probs of prompts.

    Attributes:
        name: the model and where it is served.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        dialect: Dialect = "auto",
        api_key_variable: str = "OPENAI_API_KEY",
        timeout_seconds: float = 60,
        retries: int = 4,
        most_tokens: int = 8192,
        concurrency: int = 4,
        token_text: Callable[[int], str] | None = None,
    ) -> None:
        """Remember where the server is; nothing is sent yet.

        Args:
            url: of the server, as "http://127.0.0.1:8000", ".../v1" or ".../v1/completions".
            model: its name there.
            dialect: how log-probs are asked for; "auto" asks as vLLM has it, and else as OpenAI has it.
            api_key_variable: the environment variable that holds the API key, where one is needed.
            timeout_seconds: the longest that one request may take, and the longest pause that a server may ask for.
            retries: further tries after a 429, a 5xx, a cut connection or a timeout.
            most_tokens: of one request.
            concurrency: requests at a time.
            token_text: the text of a token id, with which the texts that a server lists are compared.

        Raises:
            UsageError: an argument cannot be used, or the key has characters that none has.
        """
        if dialect not in ("auto", "openai", "vllm"):
            raise UsageError(f"dialect {dialect!r} is not known; choose from auto, openai, vllm")
        for what, value, least in (
            ("timeout", timeout_seconds, 1e-3),
            ("retries", retries, 0),
            ("most tokens of a request", most_tokens, 2),
            ("concurrency", concurrency, 1),
        ):
            if not least <= value < float("inf"):
                raise UsageError(f"{what} {value} must be at least {least:g}")
        self._server = CompletionsServer(
            url, model, api_key_variable=api_key_variable, timeout_seconds=timeout_seconds, retries=retries
        )
        self._model = model
        self._dialect = dialect
        self._most_tokens = most_tokens
        self._concurrency = concurrency
        self._token_text = token_text
        self._probed = False
        self.name = self._server.name

    def log_probs(
        self, sequences: Sequence[tuple[list[int], int]], *, progress: Callable[[int], None] | None = None
    ) -> list[ServedTokens]:
        """Score the completions of sequences, a request each, several at a time.

        A sequence's first token has no log-prob, as nothing precedes it: without a prompt the completion's first token
        is not scored.

        Args:
            sequences: the token ids of a prompt and one completion, and how many of them are the prompt's.
            progress: called with how many tokens of a sequence have been scored, in the sequences' order.

        Returns:
            One result a sequence, in their order.

        Raises:
            UsageError: a sequence is too long for one request, or the server refuses the request or the key.
            EngineOutputError: the server cannot be reached, fails or takes too long at every try, or returns too
                little, or something else than log-probs of the tokens sent.
        """
        for index, (ids, prompt_length) in enumerate(sequences):
            if not 0 <= prompt_length <= len(ids):
                raise ValueError(f"sequence {index}: a prompt of {prompt_length} tokens in {len(ids)}")
            if len(ids) > self._most_tokens:
                raise UsageError(
                    f"a sequence of {len(ids):,} tokens is longer than the {self._most_tokens:,} that one request to "
                    f"{self.name} may have: lower --max-length, or raise --endpoint-tokens"
                )
        self._server.stopped.clear()
        wanted = [(ids, max(prompt_length, 1)) for ids, prompt_length in sequences]
        first = next((ids for ids, start in wanted if start < len(ids)), None)
        if first is not None and not self._probed:
            if self._dialect == "auto":
                self._dialect = self._find_dialect(first)
            self._probe(first)
            self._probed = True
        results = []
        with ThreadPoolExecutor(self._concurrency) as pool:
            futures = [pool.submit(self._score, ids, start) for ids, start in wanted]
            try:
                for (ids, _), future in zip(wanted, futures, strict=True):
                    results.append(future.result())
                    if progress is not None:
                        progress(len(ids))
            except BaseException:
                self._server.stopped.set()  # wakes those that wait for a retry
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return results

    def _score(self, ids: list[int], start: int) -> ServedTokens:
        """The tokens of one sequence from `start` on."""
        if start >= len(ids):
            return ServedTokens(np.zeros(0, np.float32), np.zeros(0, np.float32))
        reply = self._ask(ids)
        firsts = []
        for value, top in zip(reply.log_probs[start:], reply.tops[start:], strict=True):
            # One entry alone: the server gives no top tokens, or the texts of several are the same.
            firsts.append(None if top is None or len(top) < TOP else value >= max(top.values()))
        known = None if None in firsts else np.array(firsts, np.float32)
        return ServedTokens(np.array(reply.log_probs[start:], np.float32), known)

    def _find_dialect(self, ids: list[int]) -> Dialect:
        """vLLM's, if the server answers it; servers that do not know its fields ignore or refuse them."""
        try:
            choice = self._choice(self._server.post(self._request(ids[: PROBE_LENGTH + 1], "vllm")))
        except UsageError:
            return "openai"  # if the server refuses for another reason, it refuses this too, and that is reported
        return "openai" if choice.get("prompt_logprobs") is None else "vllm"

    def _probe(self, ids: list[int]) -> None:
        """Check that log-probs belong to the tokens that they are given to; see the module's drawing.

        Args:
            ids: a sequence that will be scored, of two tokens at least.
        """
        length = min(len(ids) - 1, PROBE_LENGTH)
        lasts, tops = [], []
        for token in list(dict.fromkeys([*ids[1:], 0, 1, 2]))[:3]:
            reply = self._ask([*ids[:length], token])
            lasts.append(reply.log_probs[-1])
            # The last token's own log-prob is listed beside the top ones.
            top = reply.tops[-1] or {}
            tops.append({name: value for name, value in top.items() if name != reply.names[-1]})
        agree = sum(
            any(abs(first[name] - second[name]) < PROBE_TOLERANCE for name in first.keys() & second.keys())
            for first, second in combinations(tops, 2)
        )
        # Two pairs of three: where the last tokens are the two likeliest, those two have nothing else in common.
        if all(tops) and (agree < 2 or len(set(lasts)) == 1):
            raise EngineOutputError(
                f"{self.name} gives log-probs to the wrong tokens: what it says of the last token's alternatives does "
                "not go with what precedes it; the server is at fault, most likely off by one"
            )

    def _request(self, ids: list[int], dialect: Dialect) -> dict[str, Any]:
        """One token is generated, as some servers take 0 for "no limit"; temperature 1 leaves log-probs as they are."""
        request = {"model": self._model, "prompt": ids, "max_tokens": 1, "temperature": 1.0}
        if dialect == "vllm":
            return {**request, "prompt_logprobs": TOP, "return_token_ids": True}
        return {**request, "echo": True, "logprobs": TOP}

    def _ask(self, ids: list[int]) -> _Reply:
        """What the server says of a sequence, its tokens matched with those sent."""
        answer = self._server.post(self._request(ids, self._dialect))
        choice = self._choice(answer)
        usage: Any = answer.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        read = usage.get("prompt_tokens", len(ids))
        if read != len(ids):
            raise self._wrong(f"that it read {read} tokens", ids)
        sent = choice.get("prompt_token_ids")
        if sent is not None and sent != ids:
            raise self._wrong("that it read other token ids", ids)
        if self._dialect == "vllm":
            reply = self._vllm_reply(choice, ids)
        else:
            reply = self._openai_reply(choice, ids, usage.get("completion_tokens", 1))
        for position, value in enumerate(reply.log_probs[1:], start=1):
            if value is None:
                raise self._wrong(f"no log-prob for token {position}, id {ids[position]}", ids)
            if not _is_number(value) or not NOT_FINITE < value <= ABOVE_ONE:
                raise self._wrong(f"{value!r} as the log-prob of token {position}, which none can be", ids)
        return reply

    def _vllm_reply(self, choice: dict[str, Any], ids: list[int]) -> _Reply:
        """`prompt_logprobs`: for each token but the first {id: {"logprob": nats, ...}}."""
        entries = choice.get("prompt_logprobs")
        if not isinstance(entries, list):
            raise self._wrong("no prompt_logprobs", ids, "is it vLLM? if not, use the openai dialect")
        if len(entries) != len(ids):
            raise self._wrong(f"prompt_logprobs of {len(entries)} tokens", ids)
        names = [str(token) for token in ids]
        tops: list[dict[str, float] | None] = []
        for position, (entry, name) in enumerate(zip(entries, names, strict=True)):
            if entry is None:
                tops.append(None)
                continue
            try:
                top = {key: value["logprob"] for key, value in entry.items()}
            except (AttributeError, KeyError, TypeError):
                raise self._wrong(f"something else than log-probs for token {position}", ids) from None
            if not _is_top(top):
                raise self._wrong(f"something else than log-probs for token {position}", ids)
            if name not in top:
                raise self._wrong(f"log-probs of ids {', '.join(top)} for token {position}, which is {name}", ids)
            tops.append(top)
        values = [None if top is None else top[name] for top, name in zip(tops, names, strict=True)]
        return _Reply(values, tops, names)

    def _openai_reply(self, choice: dict[str, Any], ids: list[int], generated: Any) -> _Reply:
        """`logprobs`: parallel lists, of the prompt's tokens and of those generated."""
        logprobs = choice.get("logprobs")
        if not isinstance(logprobs, dict) or not isinstance(logprobs.get("token_logprobs"), list):
            raise self._wrong("no log-probs", ids, "the server must give log-probs of the prompt, as vLLM does")
        values = logprobs["token_logprobs"]
        names = logprobs.get("tokens")
        if not isinstance(names, list) or len(names) != len(values):
            raise self._wrong("log-probs without their tokens", ids)
        listed = len(values) - (generated if isinstance(generated, int) else 1)
        if listed != len(ids):
            raise self._wrong(
                f"log-probs of {max(listed, 0)} tokens", ids, "the server must echo the prompt with its log-probs"
            )
        for position, (name, token) in enumerate(zip(names, ids, strict=False)):
            if not self._names(name, token):
                raise self._wrong(f"{name!r} as token {position}, which is id {token}", ids)
        tops = logprobs.get("top_logprobs")
        if not isinstance(tops, list) or len(tops) != len(values):
            tops = [None] * len(values)
        tops = [top if _is_top(top) else None for top in tops]
        return _Reply(values[:listed], tops[:listed], [str(name) for name in names[:listed]])

    def _names(self, name: Any, token: int) -> bool:
        """Whether a name that a server gives to a token can be this one's.

        Blanks are left out of the comparison, as a tokenizer may write them in the next token or not at all; and so are
        parts of characters and special tokens, which servers write as nothing.
        """
        if isinstance(name, str) and name.startswith("token_id:"):  # vLLM's --return-tokens-as-token-ids
            return name == f"token_id:{token}"
        if self._token_text is None:
            return True
        said, known = (re.sub(r"[\s\u2581]", "", str(text)) for text in (name, self._token_text(token)))
        return said == known or not said or not known or "\ufffd" in said + known

    def _choice(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The one choice of an answer."""
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise EngineOutputError(
                f"{self.name} answers without a completion: is {self._server.url} a completions endpoint?"
            )
        return choices[0]

    def _wrong(self, what: str, ids: list[int], way_out: str = CHECK_IT) -> EngineOutputError:
        """What the server returned of a sequence instead of its log-probs; it may be text of the server's own."""
        return EngineOutputError(f"{self.name} returns {one_line(what)}, of {len(ids)} tokens sent; {way_out}")


def _is_top(top: Any) -> bool:
    """Whether something is log-probs by tokens."""
    return isinstance(top, dict) and all(_is_number(value) for value in top.values())


def _is_number(value: Any) -> bool:
    """Whether a value from JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)
