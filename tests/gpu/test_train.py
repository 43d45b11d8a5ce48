"""On a CUDA device a step does not wait for it, in any precision."""

import pytest
import torch

from kdcompress.execution import Execution, Precision
from kdcompress.optim import Optimisation
from kdcompress.training_step import Run
from tests.unit.tiny import Everything, TinyTeachers, tiny_loader, tiny_student

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_does_not_wait_for_the_device(precision: Precision, optimizer: str) -> None:
    device = torch.device("cuda")
    settings = Optimisation(optimizer=optimizer, lr=0.01, clip_norm=1.0, ema=0.9)
    run = Run([tiny_student()], [Everything()], settings, device, Execution(precision), 7, 21, 0)
    teachers = TinyTeachers(device)
    batches = [batch.to(device) for batch in tiny_loader().epoch(0)]
    run.train_mode()
    run.advance(batches[0], teachers, None)  # kernels are loaded and states made at the first step
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[1:]:
            run.advance(batch, teachers, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    run.require_finite()
    assert run.step == len(batches)
