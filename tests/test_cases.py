"""The table of declared cases is itself checked: nothing hides behind a wrong declaration."""

import cases
import pytest
from harness import build

import flash_attn
from flash_attn import _dispatch

EVERY_FEATURE_BUT = {"num_splits", "combine", "attn_probs", "out", "backward"}  # options of a call, not of a case


def test_ids_are_unique_and_reasons_given():
    ids = [case.id for case in cases.ALL]
    assert len(set(ids)) == len(ids)
    assert all(case.reason for case in cases.ALL)


def test_every_feature_has_a_case():
    declared = frozenset().union(*(case.features for case in cases.ALL))
    assert declared == set(_dispatch.FEATURES) - EVERY_FEATURE_BUT


@pytest.mark.parametrize("case", [case for case in cases.ALL if not case.large], ids=lambda case: case.id)
def test_declared_features_are_what_the_dispatcher_is_told(case, monkeypatch):
    """harness.on_path expects a refusal from the features that a case declares."""
    told = []

    def choose_path(q, head_dim_v, features):
        told.append((head_dim_v, features))
        return "cpu"

    monkeypatch.setattr(flash_attn._dispatch, "choose_path", choose_path)
    build(case).call()
    assert told == [(case.dims[1], case.features)]
