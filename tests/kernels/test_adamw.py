"""AdamW behind a clipping factor against torch's, by Triton's interpreter (close) or on a GPU (bit for bit)."""

import pytest
import torch

triton = pytest.importorskip("triton")

from kernels import adamw  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
if not ON_GPU and not triton.knobs.runtime.interpret:
    pytest.skip("needs a GPU or TRITON_INTERPRET=1: test_triton_interpreted.py runs it so", allow_module_level=True)

# Of one program, of several, with a rest; one whose size keeps all from loads of four.
SHAPES = {"aligned": [(48, 16), (1040, 32)], "any": [(7,), (129, 130), (1,)]}


@pytest.mark.parametrize("decay", [0.1, 0.0])
@pytest.mark.parametrize("shapes", SHAPES)
def test_it_is_torchs_after_a_multiplication_of_the_gradients(shapes, decay):
    generator = torch.Generator().manual_seed(0)
    if ON_GPU:
        assert adamw.has_torchs_bits(torch.device(DEVICE, 0)), "the kernel stays unused: this torch's has other bits"

    def drawn() -> list[torch.Tensor]:
        return [torch.randn(shape, generator=generator).to(DEVICE) for shape in SHAPES[shapes]]

    theirs = drawn()
    ours, means, squares = ([t.clone() for t in theirs], *([torch.zeros_like(t) for t in theirs] for _ in range(2)))
    optimizer = torch.optim.AdamW(theirs, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay, fused=True)
    for step in range(1, 6 if not ON_GPU else 60):
        gradients = [0.1**step * t for t in drawn()] if step < 9 else drawn()
        factor = torch.tensor(0.3371 if step % 2 else 1.0, device=DEVICE)
        skip = torch.tensor(float(step == 3), device=DEVICE)
        counters = [torch.tensor(float(step - (step > 3)), device=DEVICE) for _ in ours]
        optimizer.param_groups[0]["lr"] = lr = 1e-3 / step
        optimizer.found_inf = skip
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient * factor
        optimizer.step()
        pointers = [
            tuple(t.data_ptr() for t in row) for row in zip(ours, gradients, means, squares, counters, strict=True)
        ]
        table = adamw.Table.of(pointers, [t.numel() for t in ours], ours[0].device)
        assert table.aligned == (shapes == "aligned")
        adamw.update(table, factor, skip, adamw.Settings(lr, 0.9, 0.95, 1e-8, decay))
        for kind, mine in (("exp_avg", means), ("exp_avg_sq", squares), (None, ours)):
            expected = theirs if kind is None else [optimizer.state[t][kind] for t in theirs]
            for got, wanted in zip(mine, expected, strict=True):
                tolerance = {"rtol": 0, "atol": 0} if ON_GPU else {"rtol": 1e-4, "atol": 1e-7}
                torch.testing.assert_close(got, wanted, **tolerance)
