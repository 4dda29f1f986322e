"""Probes fit the model, and go past its window."""

from dpo_fast.export.probes import PROBES, make_probes


def test_probes_fit_the_model_and_pass_its_window() -> None:
    for window in (8, 40, 100):
        pairs = make_probes(500, window=window, positions=130)
        lengths = [len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs]
        assert window < max(lengths) <= 130
    assert max(max(p.prompt_ids + p.chosen_ids + p.rejected_ids) for p in make_probes(500)) < 500


def test_a_window_too_long_to_pass_is_left_to_others() -> None:
    assert len(make_probes(500, window=4096)) == len(PROBES)
