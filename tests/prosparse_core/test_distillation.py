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
