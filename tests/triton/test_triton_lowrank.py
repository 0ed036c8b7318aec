"""The low-rank Hessian against a dense float64 H and its definition: values, tails, strides, dtypes, bad samples."""

import pytest
import torch
from test_triton_frame import BF16, F32, F64, LAYOUTS, PAIRS, close, data

MATVEC, SOLVE, INV_SQRT = 0, 1, 2
VARIANTS = [MATVEC, SOLVE, INV_SQRT]
KINDS = {"plain": 1.0, "mixed": -0.1}  # the last s: with −0.1 and damping 1.5, H stays positive definite


@pytest.fixture(scope="module")
def reference():
    return pytest.importorskip("marquardt").reference.lowrank


def stack_of(v, k, batch_dims=1, dtype=None, seed=7, shared=False):
    """[B, k, *sample] of rows with norms around 1; one stack [k, *sample] if `shared`."""
    size = max(v.shape[batch_dims:].numel(), 1)
    batch = () if shared else v.shape[:batch_dims]
    return data(*batch, k, *v.shape[batch_dims:], seed=seed, scale=size**-0.5).to(dtype or v.dtype)


def coef_of(k, batch=None, damping=1.5, last=1.0):
    """(λ, s…), shared or a row per sample; 0 is among the s from k = 3 on."""
    s = torch.linspace(0.6, 1.4, k, dtype=F64)
    s[1:2] = 0.0 if k > 2 else s[1:2]
    s[-1:] = last
    row = torch.cat([torch.tensor([damping], dtype=F64), s])
    return row if batch is None else row * torch.linspace(0.7, 1.2, batch, dtype=F64)[:, None]


def dense(v, basis, coef, variant, batch_dims=1):
    """f(H) v with H formed and its eigenvectors, in float64; and H [B, D, D]."""
    x = v.double().reshape(v.shape[0] if batch_dims else 1, -1)
    at = basis.dim() - (v.dim() - batch_dims)
    U = basis.double().reshape(*basis.shape[:at], -1).expand(x.shape[0], -1, -1)
    c = coef.expand(x.shape[0], -1)
    H = c[:, :1, None] * torch.eye(x.shape[1], dtype=F64) + U.mT * c[:, None, 1:] @ U
    values, Q = torch.linalg.eigh(H)
    f = {MATVEC: values, SOLVE: 1 / values, INV_SQRT: values.clamp(min=0).rsqrt()}[variant]
    return (Q @ (f[:, :, None] * (Q.mT @ x[:, :, None]))).reshape(v.shape), H


def stepping(t):
    """Strides without those of a dimension of one element."""
    return [s for n, s in zip(t.shape, t.stride(), strict=True) if n != 1 and t.numel()]


def same(found, expected, dtype=None):
    """The definition's numbers, strides and types; within a rounding of the output, or 1e-12 of float64."""
    assert found.shape == expected.shape
    assert stepping(found) == stepping(expected)
    assert found.dtype == expected.dtype and (dtype is None or found.dtype == dtype)
    half = {F64: 1e-12, F32: 1.2e-7, BF16: 2.0**-8}.get(found.dtype, 2.0**-10)
    f, e = found.double(), expected.double()
    assert torch.equal(f.isnan(), e.isnan())
    f, e = f.nan_to_num(), e.nan_to_num()
    if f.numel():
        excess = (f - e).abs() - half * e.abs() - 1e-12 * e.abs().max() - 1e-15
        assert excess.max() <= 0, f"off by {(f - e).abs().max():.3g}, scale {e.abs().max():.3g}"


def check_all(
    kernels, reference, v, basis, coef, batch_dims=1, rank=None, variants=VARIANTS, determinant=True
):
    """Every entry point against the definition."""
    frame = kernels.frame
    grad = data(*v.shape, dtype=v.dtype, seed=3)
    for variant in variants:
        args = (basis, coef, variant)
        for f, e in zip(
            frame.lowrank_apply(v, *args, False, batch_dims),
            reference.apply(v, *args, False, batch_dims),
            strict=True,
        ):
            same(f, e)
        for f, e in zip(
            frame.lowrank_vjp(grad, v, *args, batch_dims),
            reference.vjp(grad, v, *args, batch_dims),
            strict=True,
        ):
            same(f, e)
    if rank is not None:
        moved = torch.cat([torch.full_like(coef[..., :1], 0.9), coef.abs()], dim=-1)
        check_update(kernels, reference, v, basis, moved, rank, batch_dims)
    k = coef.shape[-1] - 1
    if determinant and k and basis.dim() == v.dim() + 1:
        check_logdet(kernels, reference, basis, coef, batch_dims)


def check_update(kernels, reference, v, basis, coef, rank, batch_dims=1):
    """s, and Σ s u uᵀ: where two eigenvalues are close, rows turn."""
    rows, s = kernels.frame.lowrank_update(v, basis, coef, rank, batch_dims)
    exact, values = reference.update(v, basis, coef, rank, batch_dims)
    same(s, values)
    assert rows.shape == exact.shape and rows.stride() == exact.stride() and rows.dtype == v.dtype
    if rows.numel() == 0:
        return
    f, e = (t.double().reshape(s.shape[0], rank, -1) for t in (rows, exact))
    assert torch.equal(f.isnan(), e.isnan())
    assert torch.equal(f[s == 0], torch.zeros_like(f[s == 0]))
    f, e, s = f.nan_to_num(), e.nan_to_num(), s.nan_to_num()
    a, b = f.mT * s[:, None] @ f, e.mT * s[:, None] @ e
    assert (a - b).abs().max() <= max(4 * torch.finfo(v.dtype).eps, 1e-13) * b.abs().max().clamp(min=1e-30)


def check_logdet(kernels, reference, basis, coef, batch_dims=1):
    same(
        kernels.frame.lowrank_logdet(basis, coef, False, batch_dims),
        reference.logdet(basis, coef, False, batch_dims),
    )
    more = torch.cat([coef, torch.full_like(coef[..., :1], -0.7)], dim=-1)
    for f, e in zip(
        kernels.frame.lowrank_logdet_vjp(basis, more, batch_dims),
        reference.logdet_vjp(basis, more, batch_dims),
        strict=True,
    ):
        same(f, e)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k,kind", [(1, "mixed"), (3, "plain"), (4, "mixed"), (5, "mixed")])
def test_dense(kernels, k, kind):
    """H itself, its inverse, root and determinant, from a matrix that is formed."""
    v = data(2, 33)
    U, coef = stack_of(v, k), coef_of(k, last=KINDS[kind])
    for variant in VARIANTS:
        exact, H = dense(v, U, coef, variant)
        out, info = kernels.frame.lowrank_apply(v, U, coef, variant, True, 1)
        close(out, exact, F32)
        assert torch.equal(info, torch.zeros(2, 1, dtype=F64))
    found = kernels.frame.lowrank_logdet(U, coef, True, 1)
    assert (found[:, 0] - torch.linalg.slogdet(H)[1]).abs().max() <= 1e-12
    assert torch.equal(found[:, 1], torch.zeros(2, dtype=F64))


@pytest.mark.parametrize("k,size", [(0, 7), (0, 252), (1, 1), (1, 252), (3, 7), (5, 252)])
def test_tails(kernels, reference, k, size):
    v = data(1, size)
    check_all(kernels, reference, v, stack_of(v, k), coef_of(k, 1), rank=min(k + 1, 3))


@pytest.mark.parametrize("size,k", [(2049, 3), (4608, 1)])
def test_splits(kernels, reference, size, k):
    """Samples of several chunks, the last of them one element, and of less than a block."""
    v = data(1, size)
    assert kernels.launch.choose_stack(size, 1 << (k - 1).bit_length(), True).splits > 1
    check_all(kernels, reference, v, stack_of(v, k), coef_of(k), rank=2, variants=[SOLVE])


def test_most_rows(kernels, reference):
    """16 rows: 18 vectors in a gradient, 16 out, and as many numbers from the host as a call can have."""
    v = data(1, 39)
    check_all(
        kernels, reference, v, stack_of(v, 16), coef_of(16, last=-0.1), rank=16, variants=[SOLVE, INV_SQRT]
    )


@pytest.mark.parametrize(
    "batch_dims,shared,per_sample", [(0, False, False), (1, True, True), (1, True, False)]
)
def test_shared_and_unbatched(kernels, reference, batch_dims, shared, per_sample):
    v = data(2, 3, 13)
    coef = coef_of(3, (v.shape[0] if batch_dims else 1) if per_sample else None)
    check_all(kernels, reference, v, stack_of(v, 3, batch_dims, shared=shared), coef, batch_dims, rank=3)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (3,)])
def test_odd_shapes(kernels, reference, shape):
    """No sample, no element, samples that are numbers."""
    v = data(*shape)
    check_all(kernels, reference, v, stack_of(v, 2), coef_of(2), rank=2)


# --- layouts and dtypes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(kernels, reference, layout):
    """Strides of the outputs follow v; a stack of another order is copied, of any other row or batch stride read."""
    v = LAYOUTS[layout](data(2, 3, 4, 5))
    U = stack_of(v, 2)
    last = U.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    stacks = [
        U,
        last,
        torch.stack([U, U], dim=1)[:, 1],
        U[:1].expand(U.shape),
        torch.cat([U, U], dim=1)[:, ::2],
    ]
    basis = stacks[list(LAYOUTS).index(layout) % len(stacks)]
    check_all(kernels, reference, v, basis, coef_of(2), rank=2, variants=[SOLVE], determinant=False)
    if layout == "channels_last":
        check_logdet(kernels, reference, last, coef_of(2))


def test_stacks_are_not_copied(kernels, monkeypatch):
    """Row and batch strides are free, and a shared stack has none from sample to sample."""
    layout = kernels.layout.Layout.of(data(2, 3, 4).transpose(1, 2), 1)
    basis = data(2, 5, 3, 4).transpose(2, 3)[:, ::2]
    found, batch, row, k = layout.stack(basis)
    assert found is basis and (batch, row, k) == (60, 24, 3)
    assert layout.stack(basis[0])[1:] == (0, 24, 3)
    assert layout.stack(basis.contiguous())[0].stride() == (36, 12, 1, 4)


@pytest.mark.parametrize("state,model", PAIRS)
def test_dtypes(kernels, reference, state, model):
    v = data(2, 45, dtype=state)
    U = stack_of(v, 2, dtype=model)
    check_all(
        kernels, reference, v, U, coef_of(2, 2), rank=2, variants=[SOLVE], determinant=state == model == BF16
    )


def test_in_the_span(kernels):
    """g in the span of U and λ ≪ ‖U‖²: all but 1e-6 of it cancels, and the result keeps its float32 digits."""
    U = stack_of(data(1, 120), 3)
    g = torch.einsum("bkd,k->bd", U.double(), torch.tensor([1.0, -2.0, 0.5], dtype=F64)).float()
    coef = torch.tensor([1e-6, 1.0, 1.0, 1.0], dtype=F64)
    for variant in (SOLVE, INV_SQRT):
        out, _ = kernels.frame.lowrank_apply(g, U, coef, variant, True, 1)
        close(out, dense(g, U, coef, variant)[0], F32)


# --- degenerate and bad samples --------------------------------------------------------------------------------------


def test_dependent_rows(kernels, reference):
    """Equal rows, a row of zeros, rows of very different length, equal eigenvalues."""
    v = data(1, 40)
    U = torch.linalg.qr(stack_of(v, 5, dtype=F64).mT)[0].mT.contiguous().to(F32)
    U[:, 1] = U[:, 0]
    U[:, 2] = 0
    U[:, 3] *= 1e-6
    coef = torch.tensor([0.5, 1.0, 1.0, 2.0, 1e12, 1.0], dtype=F64)
    for variant in VARIANTS:
        out, _ = kernels.frame.lowrank_apply(v, U, coef, variant, True, 1)
        close(out, dense(v, U, coef, variant)[0], F32, 2)
    coef[4] = 1.0
    U[:, 3] *= 1e6
    check_all(kernels, reference, v, U, coef, rank=5, variants=[SOLVE, INV_SQRT])


@pytest.mark.parametrize("variant", [SOLVE, INV_SQRT])
def test_indefinite(kernels, reference, variant):
    """Row 2 breaks H in sample 1, the damping of sample 2 is not positive: NaN there alone, info says why."""
    v, U = data(4, 30), stack_of(data(4, 30), 3)
    coef = coef_of(3, 4)
    coef[1, 2], coef[1, 3] = -50.0, 0.2
    coef[2, 0] = 0.0
    out, info = kernels.frame.lowrank_apply(v, U, coef, variant, False, 1)
    assert info[:, 0].tolist() == [0, 2, -1, 0]
    assert torch.equal(out.isnan().all(1), info[:, 0] != 0) and not out[[0, 3]].isnan().any()
    check_all(kernels, reference, v, U, coef, variants=[variant], determinant=False)
    name = reference.NAMES[variant]
    with pytest.raises(ValueError, match=f"{name}: .*sample 1, where row 1 of U breaks it"):
        kernels.frame.lowrank_apply(v, U, coef, variant, True, 1)
    if variant == SOLVE:
        same(kernels.frame.lowrank_logdet(U, coef, False, 1), reference.logdet(U, coef, False, 1))
        more = torch.cat([coef, coef[:, :1]], dim=1)
        d_coef = kernels.frame.lowrank_logdet_vjp(U, more, 1)[1]
        assert torch.equal(d_coef.isnan().all(1), info[:, 0] != 0)
        with pytest.raises(ValueError, match="lowrank_logdet: .*sample 1"):
            kernels.frame.lowrank_logdet(U, coef, True, 1)


@pytest.mark.parametrize("where", ["v", "U", "inf", "s"])
def test_nan_stays_in_its_sample(kernels, reference, where):
    v, U, coef = data(3, 30), stack_of(data(3, 30), 2), coef_of(2, 3)
    {"v": v[1], "U": U[1, 1], "inf": U[1, 0], "s": coef[1]}[where][1] = float(
        "inf" if where == "inf" else "nan"
    )
    whole = [v[[0, 2]], U[[0, 2]], coef[[0, 2]]]
    for variant in VARIANTS if where == "v" else VARIANTS[1:]:
        out, info = kernels.frame.lowrank_apply(v, U, coef, variant, True, 1)
        assert not out[1].isfinite().any() and not info.any()
        assert torch.equal(out[[0, 2]], kernels.frame.lowrank_apply(*whole, variant, True, 1)[0])
        d_basis, d_coef = kernels.frame.lowrank_vjp(v, v, U, coef, variant, 1)
        assert not d_basis[1].isfinite().all() and (where == "s" or not d_coef[1].isfinite().all())
        assert d_basis[[0, 2]].isfinite().all() and d_coef[[0, 2]].isfinite().all()
    rows, s = kernels.frame.lowrank_update(v, U, torch.cat([coef[:, :1], coef], 1), 2, 1)
    assert rows[1].isnan().all() and s[1].isnan().all() and rows[[0, 2]].isfinite().all()
    if where != "v":
        found = kernels.frame.lowrank_logdet(U, coef, True, 1)
        assert found[:, 0].isnan().tolist() == [False, True, False] and not found[:, 1].any()


def test_update_of_nothing(kernels, reference):
    """No rows yet, more rank than there is, weights of zero: rows of exact zeros."""
    v = data(2, 19)
    check_update(kernels, reference, v, stack_of(v, 0), torch.tensor([0.9, 2.0], dtype=F64), 3)
    check_update(kernels, reference, v, stack_of(v, 2), torch.zeros(4, dtype=F64), 2)
    check_update(kernels, reference, v, stack_of(v, 2), torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=F64), 2)
    check_update(kernels, reference, v, stack_of(v, 1), torch.ones(3, dtype=F64), 0)


def test_update_of_a_wide_spectrum(kernels, reference):
    """What the eigenvalues of the Gram matrix can give: ν to 1e-16·ν₁, so rows of length 1 to 1e-16·ν₁/ν."""
    v = data(1, 50, dtype=F64)
    U = torch.linalg.qr(stack_of(v, 4, dtype=F64).mT)[0].mT.contiguous()
    coef = torch.tensor([1.0, 0.0, 1.0, 1e-4, 1e-8, 1e-11], dtype=F64)
    rows, s = kernels.frame.lowrank_update(v, U, coef, 4, 1)
    assert ((s - coef[2:]).abs() <= 4e-16).all()
    gram = rows[0] @ rows[0].mT
    bound = 4e-16 / coef[2:].minimum(coef[2:, None]) + 1e-14
    assert ((gram - torch.eye(4, dtype=F64)).abs() <= bound).all()


# --- operators -------------------------------------------------------------------------------------------------------


def test_operators_and_fakes(kernels):
    from torch._subclasses.fake_tensor import FakeTensorMode

    kernels.register()
    ops = torch.ops.marquardt_triton
    v = data(2, 3, 4, 5).to(memory_format=torch.channels_last)
    U = stack_of(v, 2, dtype=BF16)
    coef = coef_of(2)
    calls = [
        (ops.lowrank_apply, (v, U, coef, SOLVE, False, 1)),
        (ops.lowrank_apply, (v, U[0], coef, 0, True, 1)),
    ]
    calls += [
        (ops.lowrank_vjp, (v, v, U[0], coef, SOLVE, 1)),
        (ops.lowrank_vjp, (v[0], v[0], U[0], coef, 1, 0)),
    ]
    calls += [(ops.lowrank_logdet, (U, coef, False, 1)), (ops.lowrank_logdet, (U[0], coef, False, 0))]
    calls += [(ops.lowrank_logdet_vjp, (U, coef_of(3), 1)), (ops.lowrank_logdet_vjp, (U[1], coef_of(3), 0))]
    calls += [
        (ops.lowrank_update, (v, U, coef_of(3), 4, 1)),
        (ops.lowrank_update, (v[0], U[0], coef_of(3), 1, 0)),
    ]
    for op, args in calls:
        real = op(*args)
        with FakeTensorMode() as mode:
            told = op(*torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args))
        pairs = [(real, told)] if isinstance(real, torch.Tensor) else zip(real, told, strict=True)
        for f, e in pairs:
            assert (f.shape, f.dtype, f.stride()) == (e.shape, e.dtype, e.stride()), op


def test_public_functions(kernels):
    """Through the package: backend, autograd and double backward by the same kernels, against the definition."""
    mq = pytest.importorskip("marquardt")
    if not kernels.__name__.startswith("marquardt"):
        pytest.skip("the kernels are not those of the package")

    def gradients(backend):
        v, U = data(1, 11, dtype=F64).requires_grad_(), stack_of(data(1, 11, dtype=F64), 2).requires_grad_()
        s = torch.tensor([0.7, -0.1], dtype=F64, requires_grad=True)
        with mq.use_backend(backend):
            out = mq.lowrank_inv_sqrt(mq.lowrank_solve(v, U, s, damping=1.3), U, s, damping=0.9)
            whole = out.square().sum() + mq.lowrank_logdet(U, s, damping=1.3).sum()
            first = torch.autograd.grad(whole, (v, U, s))
            rows, found = mq.lowrank_update(U.detach(), None, v.detach(), decay=0.9)
            (again,) = torch.autograd.grad(
                mq.lowrank_solve(v, U, damping=1.0).square().sum(), v, create_graph=True
            )
            return [*first, *torch.autograd.grad(again.square().sum(), (v, U)), rows, found]

    for f, e in zip(gradients("triton"), gradients("reference"), strict=True):
        assert (f - e).abs().max() <= 1e-12 * e.abs().max()


def test_explain_names_what_is_not_a_kernel(kernels):
    mq = pytest.importorskip("marquardt")
    v = data(1, 5)
    with mq.use_backend("triton"):
        told = mq.explain(mq.lowrank_update, stack_of(v, 1), None, v, decay=0.9)
    assert told.backend == "triton" and "torch.linalg.eigh" in str(told)
    assert kernels.plan("lowrank_solve") is None
