import pytest
import torch

from lightning_danube import matmul_precision
from lightning_danube.matmul_precision import exact_products_by_onednn, onednn_stays_exact


def test_products_are_given_to_onednn_and_taken_back() -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    with exact_products_by_onednn() as allowed:
        assert torch.get_float32_matmul_precision() == ("medium" if allowed else "highest")
        a, b = torch.randn(64, 384), torch.randn(384, 64)
        # 384 terms of order one: float32's roundings, whichever library it is.
        torch.testing.assert_close((a @ b).double(), a.double() @ b.double(), rtol=0, atol=1e-4)
    assert torch.get_float32_matmul_precision() == "highest"


def test_not_where_it_would_round_to_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.mm(a, b) if a.dtype == torch.float64 else torch.mm(a.bfloat16(), b.bfloat16()).float()

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not onednn_stays_exact()
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_users_own_choice_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul_precision, "onednn_stays_exact", lambda: True)
    torch.set_float32_matmul_precision("high")
    try:
        with exact_products_by_onednn() as allowed:
            assert not allowed and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
