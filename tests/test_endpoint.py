"""A deployed server's log-probs: taken as they are from one that is right, and refused from one that is not."""

import math
import time
from email.utils import formatdate

import numpy as np
import pytest
import torch
from endpoint_server import Answer, Cut, FaultyServer, vllm_server
from tiny_models import make_config, make_model, save_model

from dpo_fast.engines import completions_server
from dpo_fast.engines.endpoint import EndpointEngine
from dpo_fast.errors import EngineOutputError, UsageError

VOCABULARY = 50
SEQUENCES = [([3, 14, 15, 9, 2, 6], 2), ([5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4], 7), ([26, 4], 1)]
KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No pauses worth the name, no key of the machine's, and no proxy between a test and its server."""
    monkeypatch.setattr(completions_server, "FIRST_PAUSE", 0.01)  # seconds
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def distribution(prefix):
    """The log-probs of a model that has an opinion of its own after each prefix."""
    logits = np.random.default_rng(prefix).normal(0, 2, VOCABULARY)
    return logits - np.log(np.exp(logits).sum())


def expected(ids, prompt_length):
    """Log-probs of a completion's tokens, and whether each is the model's first choice."""
    rows = [distribution(ids[:position]) for position in range(max(prompt_length, 1), len(ids))]
    tokens = ids[max(prompt_length, 1) :]
    return (
        [row[token] for row, token in zip(rows, tokens, strict=True)],
        [float(row.argmax() == token) for row, token in zip(rows, tokens, strict=True)],
    )


def top(row, token, count):
    """A server's entry for one token: the likeliest and itself."""
    return {int(index): float(row[index]) for index in [*np.argsort(-row)[:count], token]}


def vllm(request):
    """vLLM's answer."""
    ids = request["prompt"]
    entries = [None]
    for position in range(1, len(ids)):
        found = top(distribution(ids[:position]), ids[position], request["prompt_logprobs"])
        entries.append({str(index): {"logprob": value, "rank": 1} for index, value in found.items()})
    choice = {"text": "", "prompt_logprobs": entries, "prompt_token_ids": ids}
    return {"choices": [choice], "usage": {"prompt_tokens": len(ids), "completion_tokens": 1}}


def openai(request):
    """OpenAI's answer: the prompt echoed and one token more, by their texts. vLLM's fields are ignored."""
    ids = request["prompt"]
    if not request.get("echo"):
        return {"choices": [{"text": "t1"}], "usage": {"prompt_tokens": len(ids), "completion_tokens": 1}}
    tokens = [*ids, 1]
    tops = [None]
    for position in range(1, len(tokens)):
        found = top(distribution(tokens[:position]), tokens[position], request["logprobs"])
        tops.append({f"t{index}": value for index, value in found.items()})
    names = [f"t{token}" for token in tokens]
    values = [None if found is None else found[name] for found, name in zip(tops, names, strict=True)]
    logprobs = {"tokens": names, "token_logprobs": values, "top_logprobs": tops}
    return {
        "choices": [{"text": "".join(names), "logprobs": logprobs}],
        "usage": {"prompt_tokens": len(ids), "completion_tokens": 1},
    }


def score(answer, sequences=SEQUENCES, **settings):
    """What an endpoint that answers so gives."""
    with FaultyServer(answer) as server:
        return EndpointEngine(server.url, "tiny", **settings).log_probs(sequences)


def changed(answer, change):
    """An answer with something of its choice (and of its `logprobs`) changed."""

    def other(request):
        result = answer(request)
        change(result["choices"][0])
        return result

    return other


@pytest.mark.parametrize("answer", [vllm, openai])
@pytest.mark.parametrize("prompt_length", [0, 1, 3])
def test_each_dialect_gives_the_log_prob_of_every_token_that_has_one_before_it(answer, prompt_length):
    sequences = [(ids, min(prompt_length, len(ids))) for ids, _ in SEQUENCES]
    for (ids, length), served in zip(sequences, score(answer, sequences), strict=True):
        log_probs, is_top1 = expected(ids, length)
        np.testing.assert_array_equal(served.log_probs, np.array(log_probs, np.float32))
        if log_probs:
            np.testing.assert_array_equal(served.is_top1, np.array(is_top1, np.float32))


def test_token_ids_are_sent_as_they_are_one_sequence_a_request_and_nothing_scales_the_log_probs():
    with FaultyServer(openai) as server:
        EndpointEngine(server.url, "tiny", dialect="openai").log_probs(SEQUENCES)
    prompts = [request["prompt"] for request in server.requests]
    assert [ids for ids, _ in SEQUENCES] == sorted(prompts[-3:], key=[ids for ids, _ in SEQUENCES].index)
    assert len(prompts) == 3 + 3  # the probe is three
    for request in server.requests:
        assert request["model"] == "tiny"
        assert request["temperature"] == 1
        assert request["max_tokens"] == 1
        assert len(request["prompt"]) <= 12


def test_the_order_is_the_sequences_and_progress_counts_their_tokens():
    done = []
    sequences = [([index, *range(index % 7 + 2)], 1) for index in range(20)]
    with FaultyServer(vllm) as server:
        served = EndpointEngine(server.url, "tiny").log_probs(sequences, progress=done.append)
    assert done == [len(ids) for ids, _ in sequences]
    for (ids, length), each in zip(sequences, served, strict=True):
        np.testing.assert_array_equal(each.log_probs, np.array(expected(ids, length)[0], np.float32))


def test_is_top1_is_not_known_where_the_server_lists_no_alternatives():
    def no_tops(choice):
        if "logprobs" in choice:
            choice["logprobs"]["top_logprobs"] = None

    assert [served.is_top1 for served in score(changed(openai, no_tops))] == [None] * 3


def test_is_top1_is_not_known_where_texts_of_several_tokens_are_the_same():
    """Two tokens of one text leave one entry, that of the token itself, whatever its rank is."""

    def one_text(choice):
        logprobs = choice.get("logprobs")
        if logprobs and len(logprobs["tokens"]) == 7:  # the first sequence: the probe sees nothing of it
            logprobs["top_logprobs"][4] = {"": logprobs["token_logprobs"][4]}

    first, second, _ = score(changed(openai, one_text), dialect="openai", sequences=SEQUENCES[1:] + SEQUENCES[:1])[::-1]
    assert first.is_top1 is None
    assert second.is_top1 is not None


def test_nothing_is_asked_of_sequences_without_a_scored_token():
    with FaultyServer(vllm) as server:
        served = EndpointEngine(server.url, "tiny").log_probs([([4], 0), ([4, 5], 2), ([], 0)])
    assert [(len(each.log_probs), len(each.is_top1)) for each in served] == [(0, 0)] * 3
    assert server.requests == []


# What a server may get wrong: the faulty part, and what the error must say.
def _too_few(choice):
    if "logprobs" in choice:
        for values in choice["logprobs"].values():
            del values[3:]
    elif choice.get("prompt_logprobs"):
        del choice["prompt_logprobs"][3:]


def _null(choice):
    if "logprobs" in choice:
        choice["logprobs"]["token_logprobs"][-2] = None
    elif choice.get("prompt_logprobs"):
        choice["prompt_logprobs"][-1] = None


def _set(value):
    def change(choice):
        if "logprobs" in choice:
            choice["logprobs"]["token_logprobs"][-2] = value
        elif choice.get("prompt_logprobs"):
            for entry in choice["prompt_logprobs"][-1].values():
                entry["logprob"] = value

    return change


def _other_ids(choice):
    if "logprobs" in choice:
        choice["logprobs"]["tokens"][1] = "token_id:49"
    elif choice.get("prompt_logprobs"):
        choice["prompt_logprobs"][1] = {"49": {"logprob": -1.0}}


@pytest.mark.parametrize("answer", [vllm, openai])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_too_few, "of 3 tokens|of 2 tokens"),
        (_null, "no log-prob for token"),
        (_set(float("nan")), "nan"),
        (_set(-9999.0), "-9999"),
        (_set(float("-inf")), "-inf"),
        (_set(0.5), "0.5"),
        (_set("many"), "many|something else"),
        (_other_ids, "49"),
    ],
)
def test_faulty_log_probs_are_refused(answer, change, says):
    with pytest.raises(EngineOutputError, match=says):
        score(changed(answer, change))


def test_a_text_that_is_not_the_tokens_is_refused_and_blanks_and_specials_are_not_compared():
    assert len(score(openai, token_text=lambda token: f"\u2581t{token}")) == 3
    assert len(score(openai, token_text=lambda token: "")) == 3
    with pytest.raises(EngineOutputError, match="'t3' as token 0, which is id 3"):
        score(openai, token_text=lambda token: f"u{token}")


@pytest.mark.parametrize("field", ["prompt_tokens", "prompt_token_ids"])
def test_a_server_that_read_other_tokens_is_refused(field):
    def other(request):
        result = vllm(request)
        if field == "prompt_tokens":
            result["usage"]["prompt_tokens"] += 1  # one that adds a beginning of sequence
        else:
            result["choices"][0]["prompt_token_ids"] = [1, *request["prompt"][1:]]
        return result

    with pytest.raises(EngineOutputError, match="that it read"):
        score(other)


@pytest.mark.parametrize("answer", [vllm, openai])
@pytest.mark.parametrize("shift", [1, -1])
def test_log_probs_of_the_token_before_or_after_are_found_by_the_probe(answer, shift):
    """As many values as tokens, each a log-prob: only what they depend on shows that they are another token's."""
    if shift == 1:  # what comes after the token, as some libraries pair scores and tokens

        def shifted(request):
            ids = request["prompt"]
            result = answer(request)
            _replace(result, ids, lambda position: top(distribution(ids[: position + 1]), ids[position], 2))
            return result
    else:

        def shifted(request):
            ids = request["prompt"]
            result = answer(request)
            _replace(
                result,
                ids,
                lambda position: {
                    (ids[position] if index == ids[position - 1] else index): value
                    for index, value in top(distribution(ids[: position - 1]), ids[position - 1], 2).items()
                },
            )
            return result

    with pytest.raises(EngineOutputError, match="wrong tokens"):
        score(shifted)


def _replace(result, ids, entry):
    """Other entries for the tokens of a prompt but the first."""
    choice = result["choices"][0]
    for position in range(1, len(ids)):
        found = entry(position)
        if "logprobs" in choice:
            choice["logprobs"]["top_logprobs"][position] = {f"t{index}": value for index, value in found.items()}
            choice["logprobs"]["token_logprobs"][position] = found[ids[position]]
        elif choice.get("prompt_logprobs"):
            choice["prompt_logprobs"][position] = {str(key): {"logprob": value} for key, value in found.items()}


def test_a_server_without_log_probs_of_the_prompt_is_told_of():
    def generated_only(request):
        return {"choices": [{"text": "t1", "logprobs": None}], "usage": {"prompt_tokens": len(request["prompt"])}}

    with pytest.raises(EngineOutputError, match=r"no log-probs, of 6 tokens sent|no log-probs, of .* as vLLM does"):
        score(generated_only)
    with pytest.raises(EngineOutputError, match=r"no prompt_logprobs.*openai dialect"):
        score(generated_only, dialect="vllm")


NESTED = b"[" * 100_000  # deeper than Python's own parser goes


@pytest.mark.parametrize(
    "body", [b"<html>hello</html>", b"[1, 2]", b"", NESTED, {"choices": []}, {"choices": [{}, {}]}]
)
def test_an_answer_that_is_no_completion_is_refused(body):
    with pytest.raises(EngineOutputError, match=r"JSON object|without a completion"):
        score(lambda request: (_ for _ in ()).throw(Answer(200, body)))


@pytest.mark.parametrize("place", ["usage", "log-prob", "id", "refusal"])
def test_a_servers_own_text_is_one_short_line_without_control_characters(place):
    hostile = "\x1b[2J\u202e\n" + "x" * 100_000

    def answer(request):
        result = vllm(request)
        entries = result["choices"][0]["prompt_logprobs"]
        if place == "usage":
            result["usage"]["prompt_tokens"] = hostile
        elif place == "log-prob":
            entries[1][str(request["prompt"][1])]["logprob"] = hostile
        elif place == "id":
            entries[1] = {hostile: {"logprob": -1.0}}
        else:
            raise Answer(400, NESTED if len(request["prompt"]) % 2 else {"error": {"message": hostile}})
        return result

    with pytest.raises((EngineOutputError, UsageError)) as caught:
        score(answer, dialect="vllm")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


def failing(times, error, answer=vllm):
    """An answer that comes only after so many failures."""
    left = [times]

    def other(request):
        if left[0]:
            left[0] -= 1
            raise error
        return answer(request)

    return other


@pytest.mark.parametrize("error", [Answer(500, {}), Answer(503, b"busy"), Answer(429, {}), Cut()])
def test_what_may_pass_is_tried_again(error):
    served = score(failing(3, error), retries=3)
    np.testing.assert_array_equal(served[0].log_probs, np.array(expected(*SEQUENCES[0])[0], np.float32))


@pytest.mark.parametrize("error", [Answer(502, {"error": {"message": "no worker"}}), Cut()])
def test_what_does_not_pass_is_an_error_after_so_many_tries(error):
    with FaultyServer(failing(1000, error)) as server:
        with pytest.raises(EngineOutputError, match=r"(502 \(no worker\)|breaks off).*3 tries"):
            EndpointEngine(server.url, "tiny", retries=2).log_probs(SEQUENCES)
        assert len(server.requests) == 3


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_the_pause_that_a_server_asks_for_is_kept(form):
    begun = time.time()
    value = "1" if form == "seconds" else formatdate(math.ceil(begun) + 1, usegmt=True)
    score(failing(1, Answer(429, {}, {"Retry-After": value})))
    assert time.time() - begun >= (1 if form == "seconds" else math.ceil(begun) + 1 - begun)


def test_a_pause_longer_than_the_timeout_is_not_waited_for():
    with pytest.raises(EngineOutputError, match="asks for a pause of 3600 s"):
        score(failing(1, Answer(429, {}, {"Retry-After": "3600"})))


def test_a_server_that_does_not_answer_is_not_waited_for():
    begun = time.monotonic()
    with pytest.raises(EngineOutputError, match=r"takes longer than 0\.2 s, at 2 tries"):
        score(lambda request: time.sleep(2), timeout_seconds=0.2, retries=1)
    assert time.monotonic() - begun < 2


def test_a_server_that_dribbles_is_not_waited_for():
    """Each byte comes within the timeout, the whole does not."""
    with FaultyServer(vllm, seconds_a_byte=0.02) as server:
        begun = time.monotonic()
        with pytest.raises(EngineOutputError, match=r"takes longer than 0\.3 s, at 1 tries"):
            EndpointEngine(server.url, "tiny", timeout_seconds=0.3, retries=0).log_probs(SEQUENCES)
        assert time.monotonic() - begun < 2


def test_nobody_there_is_an_error_that_names_the_address():
    with FaultyServer(vllm) as server:
        pass
    with pytest.raises(EngineOutputError, match=r"tiny at 127\.0\.0\.1:\d+ cannot be reached"):
        EndpointEngine(server.url, "tiny", retries=1).log_probs(SEQUENCES)


@pytest.mark.parametrize(
    ("status", "message", "says"),
    [
        (401, "bad key", "401, bad key; set OPENAI_API_KEY"),
        (404, "The model `tiny` does not exist.", "404, The model `tiny` does not exist.*--model 'tiny'"),
        (400, "Requested prompt logprobs of 2, which is greater than max allowed: 1", "--max-logprobs 2"),
        (400, "This model's maximum context length is 4 tokens", "--max-length"),
        (500, "logprobs is not supported for models created with logits_all=False", "--logits_all true"),
        (500, "3 validation errors: {'type': 'string_type', 'loc': ('body', 'prompt', 'str')}", "no token ids"),
        (307, "elsewhere", "redirects"),
    ],
)
def test_a_refusal_is_not_tried_again_and_says_what_to_do(status, message, says):
    error = Answer(status, {"error": {"message": message}}, {"Location": "http://127.0.0.1:9/v1/completions"})
    with FaultyServer(failing(1000, error)) as server, pytest.raises(UsageError, match=says):
        EndpointEngine(server.url, "tiny").log_probs(SEQUENCES)
    assert len(server.requests) == 2  # each dialect once


def test_the_key_comes_from_the_environment_and_is_in_no_error(monkeypatch, capsys):
    monkeypatch.setenv("A_KEY", f" {KEY}\n")
    with FaultyServer(vllm) as server:
        engine = EndpointEngine(server.url, "tiny", api_key_variable="A_KEY")
        engine.log_probs(SEQUENCES)
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert KEY not in engine.name
    for error in (Answer(401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}), Answer(500, KEY.encode())):
        with FaultyServer(failing(1000, error)) as server, pytest.raises((UsageError, EngineOutputError)) as caught:
            EndpointEngine(server.url, "tiny", api_key_variable="A_KEY", retries=1).log_probs(SEQUENCES)
        seen = caught.value
        assert "***" in str(seen)
        while seen is not None:
            assert KEY not in str(seen)
            seen = None if seen.__suppress_context__ else seen.__context__
    monkeypatch.setenv("A_KEY", KEY + "\nX-Other: 1")
    with pytest.raises(UsageError, match="A_KEY holds blanks") as caught:
        EndpointEngine("http://127.0.0.1", "tiny", api_key_variable="A_KEY")
    assert KEY not in str(caught.value)
    assert KEY not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("url", "sent_to"),
    [
        ("http://host:8000", "http://host:8000/v1/completions"),
        ("http://host/v1/", "http://host/v1/completions"),
        ("https://host/team/v1/completions", "https://host/team/v1/completions"),
    ],
)
def test_urls_are_completed(url, sent_to):
    assert EndpointEngine(url, "tiny")._server.url == sent_to


@pytest.mark.parametrize(
    "url",
    [
        "host:8000",
        "ftp://host",
        "file:///etc/passwd",
        "http://",
        "http://u:hunter2@host",
        "http://host?a=b",
        "http://h:x",
    ],
)
def test_urls_that_are_none_are_refused_and_no_password_is_repeated(url):
    with pytest.raises(UsageError, match="--endpoint") as caught:
        EndpointEngine(url, "tiny")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [{"dialect": "chat"}, {"timeout_seconds": 0}, {"timeout_seconds": math.nan}, {"retries": -1}, {"concurrency": 0}],
)
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(UsageError):
        EndpointEngine("http://host", "tiny", **settings)


def test_a_sequence_too_long_for_one_request_is_refused_before_anything_is_sent():
    with FaultyServer(vllm) as server, pytest.raises(UsageError, match=r"12 tokens.*11.*--max-length"):
        EndpointEngine(server.url, "tiny", most_tokens=11).log_probs(SEQUENCES)
    assert server.requests == []


@pytest.mark.slow
def test_vllm_says_what_pytorch_says(tmp_path, monkeypatch):
    """The real server, started once: its log-probs in both dialects, and what it refuses."""
    # Heads of 32: the smallest that vLLM's attention has on CPUs.
    model = make_model(make_config(hidden_size=128, intermediate_size=128), scale=0.1)
    folder = save_model(model, tmp_path / "model")
    sequences = _draw_sequences(model)
    monkeypatch.setenv("A_KEY", KEY)
    settings = {"api_key_variable": "A_KEY", "timeout_seconds": 300}  # the first request compiles
    with vllm_server(folder, KEY, tmp_path / "log") as url:
        by_dialect = {
            dialect: EndpointEngine(url, "tiny", dialect=dialect, **settings).log_probs(sequences)
            for dialect in ("auto", "vllm", "openai")
        }
        refused = {
            "401.*A_KEY is not accepted": ("tiny", SEQUENCES, "wrong-key"),
            "404.*`nobody` does not exist": ("nobody", SEQUENCES, KEY),
            "400.*maximum context length is 256.*--max-length": ("tiny", [(list(range(300)), 3)], KEY),
            "400.*out of vocabulary": ("tiny", [([1, 2, 9999], 1)], KEY),
        }
        for says, (name, wrong, key) in refused.items():
            monkeypatch.setenv("A_KEY", key)
            with pytest.raises(UsageError, match=says):
                EndpointEngine(url, name, **settings).log_probs(wrong)
    assert KEY not in (tmp_path / "log").read_text()
    for dialect, results in by_dialect.items():
        for (ids, prompt_length), served in zip(sequences, results, strict=True):
            with torch.inference_mode():
                rows = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            before = range(max(prompt_length, 1) - 1, len(ids) - 1)
            log_probs = [float(rows[position, ids[position + 1]]) for position in before]
            # Two float32 orders of the same sums of 128 products; another token's log-prob is nats away.
            np.testing.assert_allclose(served.log_probs, log_probs, rtol=0, atol=2e-5)
            is_top1 = [float(rows[position].argmax() == ids[position + 1]) for position in before]
            # By texts it is not known where several tokens' texts are the same, parts of characters most of all.
            if dialect != "openai" or served.is_top1 is not None:
                np.testing.assert_array_equal(served.is_top1, np.array(is_top1, np.float32))
    assert any(served.is_top1 is not None for served in by_dialect["openai"])


def _draw_sequences(model):
    """Sequences of various lengths, every other token of their completions the model's first choice."""
    random = np.random.default_rng(0)
    sequences = []
    for length, prompt_length in ((10, 4), (30, 0), (60, 12), (200, 100), (5, 1), (31, 30)):
        ids = random.integers(1, 449, length).tolist()
        for position in range(max(prompt_length, 1), length, 2):
            with torch.inference_mode():
                ids[position] = int(model(torch.tensor([ids[:position]])).logits[0, -1].argmax())
        sequences.append((ids, prompt_length))
    return sequences
