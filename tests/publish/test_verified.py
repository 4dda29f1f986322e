"""What is read of a verification: what is shown, and damage that is no traceback."""

import json
from pathlib import Path
from typing import Any

import pytest
from fake_engines import make_fake_bundle
from markdown_it import MarkdownIt
from test_card import HOSTILE, Page, render
from test_push import attest, verification_of

from dpo_fast.bundle import Bundle, open_bundle
from dpo_fast.errors import BundleError, InputError, UsageError
from dpo_fast.files import write_json
from dpo_fast.publish.card import render_card_use
from dpo_fast.publish.verified import find_verification


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return open_bundle(make_fake_bundle(tmp_path / "bundle"))


def test_none_is_none_and_the_files_are_looked_at_all_the_same(bundle: Bundle) -> None:
    assert find_verification(bundle, None) is None
    (bundle.folder / "policy.onnx").write_bytes(b"altered!")
    with pytest.raises(BundleError, match=r"policy\.onnx: is not the file"):
        find_verification(bundle, None)


def test_a_folder_goes_before_the_attestation_which_must_be_right_all_the_same(bundle: Bundle, tmp_path: Path) -> None:
    attest(bundle.folder, verdict="fail")
    write_json(tmp_path / "verify.json", verification_of(bundle.folder))

    attested, named = find_verification(bundle, None), find_verification(bundle, tmp_path)
    assert attested is not None
    assert named is not None
    assert (attested.verdict, named.verdict) == ("fail", "pass")
    (bundle.folder / "attestation.json").write_text("{}")
    with pytest.raises(BundleError):
        find_verification(bundle, tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        {"verdict": "excellent"}, {"verdict": None}, {"checks": [{}]}, {"checks": 3}, {"reasons": None},
        {"tolerance": []}, {"provenance": None}, {"provenance": {"models": {"policy": {}}}},
        {"provenance": {"models": []}},
    ],
)  # fmt: skip
def test_a_damaged_verification_is_refused_in_one_line(bundle: Bundle, tmp_path: Path, damage: dict[str, Any]) -> None:
    write_json(tmp_path / "verify.json", {**verification_of(bundle.folder), **damage})
    with pytest.raises(InputError) as caught:
        find_verification(bundle, tmp_path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["", "[", "[]", "3", "\x00"])
def test_what_is_no_json_object_is_refused(bundle: Bundle, tmp_path: Path, text: str) -> None:
    (tmp_path / "verify.json").write_text(text)
    with pytest.raises(UsageError, match=r"holds no readable verify\.json"):
        find_verification(bundle, tmp_path)


def test_another_role_s_hashes_count_too(bundle: Bundle, tmp_path: Path) -> None:
    value = json.loads(json.dumps(verification_of(bundle.folder)))
    value["provenance"]["models"]["reference"]["weights_and_graph_sha256"] = ["0" * 64]
    write_json(tmp_path / "verify.json", value)
    with pytest.raises(UsageError, match="is of other weights or graphs"):
        find_verification(bundle, tmp_path)


@pytest.mark.parametrize("of_recipe", [False, None])
def test_another_engine_does_not_stand_for_the_bundle_s(bundle: Bundle, tmp_path: Path, of_recipe: bool | None) -> None:
    """The exact graph, or a server, passes where the engine that is published may not."""
    value = json.loads(json.dumps(verification_of(bundle.folder)))
    value["provenance"]["of_recipe"] = of_recipe
    write_json(tmp_path / "verify.json", value)
    with pytest.raises(UsageError, match="not of the bundle's own engine"):
        find_verification(bundle, tmp_path)


def test_hostile_text_in_a_verification_stays_text_on_the_card(bundle: Bundle, tmp_path: Path) -> None:
    value = json.loads(json.dumps(verification_of(bundle.folder, reasons=[HOSTILE])))
    value["checks"][0]["name"] = value["tolerance"][HOSTILE] = HOSTILE
    value["provenance"]["engine"] = value["provenance"]["dataset"]["name"] = HOSTILE
    write_json(tmp_path / "verify.json", value)
    attest(bundle.folder)
    clean = render_card_use(render(), repo_id="a/b", verified=find_verification(bundle, None))

    card = render_card_use(render(), repo_id="a/b", verified=find_verification(bundle, tmp_path))
    assert "## Verification" in clean
    assert set(Page(card).tags) == set(Page(clean).tags)
    assert "<script>" not in card
    assert "\x1b" not in card
    assert MarkdownIt().render(card).count("<h2>") == MarkdownIt().render(clean).count("<h2>")
    assert render_card_use(card, repo_id="a/b", verified=find_verification(bundle, tmp_path)) == card
