"""AUC and log loss against counting pairs."""

from __future__ import annotations

import math

import pytest
import torch

from thresher.train.evaluation import Score, better, score


def counted(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of pairs of a positive and a negative that are in order; ties count half."""
    difference = logits[labels == 1].unsqueeze(1) - logits[labels == 0].unsqueeze(0)
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_share_of_ordered_pairs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(500, generator=generator) < 0.3).float()
    logits = torch.randn(500, generator=generator).mul(5).round() / 5 + labels  # with ties
    assert score(logits, labels).auc == pytest.approx(counted(logits, labels), abs=1e-6)


def test_large_logits_keep_their_order() -> None:
    labels = torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert score(torch.tensor([30.0, 31.0, 29.0, 32.0]), labels).auc == 1.0


def test_log_loss_is_the_mean_of_minus_the_logs() -> None:
    labels, p = torch.tensor([1.0, 0.0]), [0.8, 0.4]
    logits = torch.tensor([math.log(x / (1 - x)) for x in p])
    assert score(logits, labels).logloss == pytest.approx(-(math.log(0.8) + math.log(0.6)) / 2)


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="both classes"):
        score(torch.zeros(3), torch.ones(3))


def test_predictions_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="1 of 3 predictions are not finite"):
        score(torch.tensor([0.0, math.nan, 1.0]), torch.tensor([0.0, 1.0, 1.0]))


def test_better_needs_a_higher_auc() -> None:
    assert better(Score(0.5, 1.0), None)
    assert not better(Score(0.5, 0.1), Score(0.5, 1.0))
    assert better(Score(0.6, 9.0), Score(0.5, 1.0))
