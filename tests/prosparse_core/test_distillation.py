"""KL from the teacher against its definition, written out."""

from __future__ import annotations

import pytest
import torch

from prosparse_core.distillation import distillation_loss


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_it_is_the_kl_divergence_over_the_labelled_positions(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 7, generator=generator) for _ in range(2))
    labels = torch.tensor([[1, 2, -100, 3, 4], [-100, -100, 5, 6, -100]])
    expected = 0.0
    for b in range(2):
        for t in range(4):
            if labels[b, t + 1] != -100:
                p = torch.softmax(teacher[b, t].double() / temperature, 0)
                q = torch.softmax(student[b, t].double() / temperature, 0)
                expected += float((p * (p.log() - q.log())).sum()) * temperature**2
    assert float(distillation_loss(student, teacher, labels, temperature)) == pytest.approx(expected, rel=1e-5)


def test_a_perfect_student_has_no_loss_and_no_gradient_and_the_teacher_never_has_one() -> None:
    student = torch.randn(1, 4, 6, requires_grad=True)
    teacher = student.detach().clone().requires_grad_()
    loss = distillation_loss(student, teacher, torch.ones(1, 4, dtype=torch.long), 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-6
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_gradient_is_that_of_the_textbook_form_over_many_chunks(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against log_softmax and kl_div in fp64, scaled as a loss among others is; unlabelled positions have none."""
    monkeypatch.setattr("prosparse_core.loss._CHUNK_BYTES", 4 * 11 * 3)
    generator = torch.Generator().manual_seed(1)
    student, teacher = (3 * torch.randn(2, 8, 11, generator=generator) for _ in range(2))
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
    as_they_were = student.detach().clone(), teacher.clone()
    labels = torch.randint(0, 11, (2, 8), generator=generator)
    labels[0, 3:6] = -100
    (0.25 * distillation_loss(student, teacher, labels, 1.7)).backward()
    twin = student.detach().double().requires_grad_()
    wanted = labels[:, 1:] != -100
    log_q = (twin[:, :-1][wanted] / 1.7).log_softmax(-1)
    log_p = (teacher.double()[:, :-1][wanted] / 1.7).log_softmax(-1)
    (0.25 * 1.7**2 * torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)).backward()
    assert student.grad is not None
    assert twin.grad is not None
    assert not student.grad[:, -1].any()
    assert not student.grad[0, 2:5].any()
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(student.grad.double(), twin.grad, rtol=tolerance, atol=tolerance / 10)
    assert torch.equal(student, as_they_were[0])
    assert torch.equal(teacher, as_they_were[1])


def test_a_weight_is_in_the_gradient_before_it_is_rounded() -> None:
    """1/1022 in bf16 is 1/1024: multiplied with afterwards, every element of the gradient would be 0.2 % too small."""
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(1, 65, 101, generator=generator).bfloat16() for _ in range(2))
    labels = torch.ones(1, 65, dtype=torch.long)
    leaf, twin = student.clone().requires_grad_(), student.float().requires_grad_()
    loss = distillation_loss(leaf, teacher, labels, 1.0, 1 / 1022)
    loss.backward(retain_graph=True)
    expected = distillation_loss(twin, teacher.float(), labels, 1.0) / 1022
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert leaf.grad is not None
    assert twin.grad is not None
    ratio = leaf.grad[:, :-1].double() / twin.grad[:, :-1].double()
    assert float(ratio.mean()) == pytest.approx(1, abs=1e-4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
