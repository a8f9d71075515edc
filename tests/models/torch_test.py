"""PyTorch modules as JAX functions, and PyTorch's checkpoints in our architectures, against PyTorch itself."""

import copy
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from robustjax import attacks, certification, models
from robustjax.models import _torch

torch = pytest.importorskip("torch", reason='PyTorch is missing: pip install "robustjax[torch]"')
pytest.importorskip("torchax", reason='torchax is missing: pip install "robustjax[torch]"', exc_type=AttributeError)
nn = torch.nn
conv = lambda inputs, outputs, size, stride=1: nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class Block(nn.Module):
    def __init__(self, inputs, layers):
        super().__init__()
        self.number, width, total = len(layers), inputs, 1
        for i, (size, outputs, stride) in enumerate(layers, 1):
            self.add_module(f"conv{i}", conv(width, outputs, size, stride))
            self.add_module(f"bn{i}", nn.BatchNorm2d(outputs))
            width, total = outputs, total * stride
        self.downsample = None
        if total > 1 or width != inputs:
            self.downsample = nn.Sequential(conv(inputs, width, 1, total), nn.BatchNorm2d(width))

    def forward(self, x):
        y = x
        for i in range(1, self.number + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = y.relu() if i < self.number else y
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet(nn.Module):
    def __init__(self, widths, depths, *, bottleneck=False, large_stem=False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False) if large_stem else conv(3, widths[0], 3)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.pool = nn.MaxPool2d(3, 2, 1) if large_stem else nn.Identity()
        inputs = widths[0]
        for stage, (width, depth) in enumerate(zip(widths, depths), 1):
            blocks = []
            for i in range(depth):
                stride = 2 if stage > 1 and i == 0 else 1
                layers = [(3, width, stride), (3, width, 1)]
                if bottleneck:
                    layers = [(1, width, 1), (3, width, stride), (1, 4 * width, 1)]
                blocks.append(Block(inputs, layers))
                inputs = layers[-1][1]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.stages, self.fc = len(widths), nn.Linear(inputs, 10)

    def forward(self, x):
        x = self.pool(self.bn1(self.conv1(x)).relu())
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


class WideBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs, 3)
        self.convShortcut = conv(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x):
        active = self.bn1(x).relu()
        y = self.conv2(self.bn2(self.conv1(active)).relu())
        return y + (x if self.convShortcut is None else self.convShortcut(active))


class Stage(nn.Module):
    def __init__(self, inputs, outputs, stride, depth):
        super().__init__()
        steps = [(inputs, stride)] + [(outputs, 1)] * (depth - 1)
        self.layer = nn.Sequential(*(WideBlock(width, outputs, step) for width, step in steps))

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    def __init__(self, depth, width):
        super().__init__()
        self.conv1, blocks = conv(3, 16, 3), (depth - 4) // 6
        self.block1 = Stage(16, 16 * width, 1, blocks)
        self.block2 = Stage(16 * width, 32 * width, 2, blocks)
        self.block3 = Stage(32 * width, 64 * width, 2, blocks)
        self.bn1, self.fc = nn.BatchNorm2d(64 * width), nn.Linear(64 * width, 10)

    def forward(self, x):
        return self.fc(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))).relu().mean((2, 3)))


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(8 * 16, 10)

    def forward(self, x):
        return self.head(self.dropout(self.norm(self.conv(x)).relu().flatten(1)))


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.start, self.position = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 5, 16))
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = self.encoder(torch.cat([self.start.expand(len(x), -1, -1), x], 1) + self.position)
        return self.head((x + self.attention(x, x, x, need_weights=False)[0])[:, 0])


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.means, self.sds = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])

    def forward(self, x):
        return (x - self.means[:, None, None]) / self.sds[:, None, None]


DRAWS = {"num_selection": 20, "num_estimation": 200, "batch_size": 200}
MODULES = {"cnn": CNN, "resnet": lambda: ResNet((8, 16), (1, 1)), "vit": ViT}


def made(build):
    """A module with random weights and statistics, in training mode but for one part."""
    torch.manual_seed(0)
    module = build()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for name, low, high in (("weight", 0.3, 1.3), ("bias", -0.5, 0.5)):
                nn.init.uniform_(getattr(part, name), low, high)
            part.running_mean.uniform_(-0.5, 0.5)
            part.running_var.uniform_(0.3, 1.3)
    module.train()
    next(module.children()).eval()
    return module


def images(count=4, size=8):
    return np.random.default_rng(0).random((count, size, size, 3), np.float32)


def in_torch(module, x):
    """PyTorch's outputs, and the gradient of their weighted sum."""
    inner = torch.from_numpy(np.moveaxis(x, -1, 1).copy()).requires_grad_()
    outputs = copy.deepcopy(module).eval()(inner)
    (outputs * torch.arange(10.0)).sum().backward()
    return outputs.detach().numpy(), np.moveaxis(inner.grad.numpy(), 1, -1)


@pytest.mark.parametrize("name", MODULES)
def test_outputs_and_gradients_are_those_of_pytorch(name):
    module, x = made(MODULES[name]), images()
    modes = [part.training for part in module.modules()]
    before = {key: value.clone() for key, value in module.state_dict().items()}
    function = models.from_torch(module, x)
    want, gradient = in_torch(module, x)
    np.testing.assert_allclose(function(x), want, atol=1e-4)
    got = jax.jit(jax.grad(lambda x: (function(x) @ jnp.arange(10.0)).sum()))(x)
    np.testing.assert_allclose(got, gradient, atol=1e-3 * np.abs(gradient).max())
    assert [part.training for part in module.modules()] == modes
    assert len(set(modes)) == 2
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_gradients_by_the_weights_are_those_of_pytorch():
    module, x = made(CNN), images()
    function = models.from_torch(module, x.shape)
    got = jax.grad(lambda function: (function(x) @ jnp.arange(10.0)).sum())(function).args[0]
    twin = copy.deepcopy(module).eval()
    (twin(torch.from_numpy(np.moveaxis(x, -1, 1).copy())) * torch.arange(10.0)).sum().backward()
    for name, value in twin.named_parameters():
        np.testing.assert_allclose(got[name], value.grad, rtol=1e-3, atol=1e-3 * value.grad.abs().max().item())
    assert got.keys() == {*dict(twin.named_parameters()), "norm.running_mean", "norm.running_var"}


def test_modules_of_one_structure_share_a_program():
    module = made(CNN)
    first = models.from_torch(module, (4, 8, 8, 3))
    first(images())
    traced = _torch._call._cache_size()
    module(torch.zeros(4, 3, 8, 8))  # in training mode: statistics and their counter move
    again, other = models.from_torch(module, (4, 8, 8, 3)), models.from_torch(CNN(), (4, 8, 8, 3))
    first(images())
    assert _torch._call._cache_size() == traced
    assert first.func == again.func == other.func
    assert hash(first.func) == hash(other.func)
    assert np.abs(first(images()) - again(images())).max() > 1e-3  # a weight each of their own
    module.dropout = nn.Tanh()
    assert models.from_torch(module, (4, 8, 8, 3)).func != first.func
    scaled = lambda scale: models.from_torch(nn.LeakyReLU(scale), (2, 3)).func
    assert scaled(0.1) == scaled(0.1) != scaled(0.2)


def test_later_training_does_not_reach_the_function():
    module = nn.Linear(3, 2)
    function = models.from_torch(module, (4, 3))
    before = np.asarray(function(jnp.ones((1, 3))))
    with torch.no_grad():
        module.weight.zero_()
    np.testing.assert_array_equal(function(jnp.ones((1, 3))), before)


def test_it_is_attacked_and_certified_like_any_other():
    function, x = models.from_torch(made(CNN), (4, 8, 8, 3)), jnp.asarray(images())
    labels = function(x).argmax(-1)
    adversarial = attacks.pgd(epsilon=0.3, norm="linf", steps=5)(jax.random.key(0), function, x, labels)
    assert np.abs(adversarial - x).max() <= 0.3 + 1e-6
    rows = np.arange(4)
    assert (function(adversarial)[rows, labels] < function(x)[rows, labels]).any()
    certificate = certification.certify(jax.random.key(0), function, x, certification.gaussian(0.1), **DRAWS)
    assert certificate.label.shape == (4,)
    assert np.isfinite(certificate.radius).all()


def test_images_come_back_in_the_last_axis_and_other_inputs_pass_unchanged():
    denoiser = nn.Conv2d(3, 5, 3, padding=1)
    assert models.from_torch(denoiser, (2, 8, 6, 3))(images(2)[:, :, :6]).shape == (2, 8, 6, 5)
    tokens = nn.LayerNorm(6)
    x = np.random.default_rng(0).random((2, 4, 6), np.float32)
    with torch.no_grad():
        np.testing.assert_allclose(models.from_torch(tokens, x)(x), tokens(torch.from_numpy(x)), atol=1e-5)


def test_attributes_tied_weights_and_integer_buffers_are_translated():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.scale = nn.Linear(4, 4), nn.Linear(4, 4), torch.full((4,), 2.0)
            self.b.weight = self.a.weight
            self.register_buffer("order", torch.tensor([3, 1, 2, 0]))

        def forward(self, x):
            return self.b(self.a(x))[:, self.order] * self.scale + torch.arange(4)

    function = models.from_torch(Tied(), (3, 4))  # which compares the outputs
    assert function.args[0].keys() == {"a.weight", "a.bias", "b.bias", "scale"}


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (torch.special.airy_ai, "Operator with name aten::special_airy_ai has no lowering"),
        (lambda x: x * float(x.sum()), "module must be one that torchax translates (torch "),
        (lambda x: x + torch.rand(4), "compute in JAX what it does in PyTorch, got outputs that differ by "),
        (lambda x: x / 0, "module must return finite outputs for example, got 12 that are not."),
        (lambda x: (x, x), "module must return one tensor, got tuple from Applied"),
        (lambda x: x[:, :9].reshape(2, 9), "module must take example, inputs (3, 4), got from Applied RuntimeError"),
    ],
)
def test_what_cannot_be_translated_is_named(function, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        models.from_torch(Applied(function), (3, 4))


def test_images_with_channels_first_are_told_where_channels_belong():
    with pytest.raises(ValueError, match=re.escape("inputs (2, 3, 8, 8) with channels last, got from Conv2d")):
        models.from_torch(nn.Conv2d(3, 4, 3), (2, 3, 8, 8))


def test_bad_arguments_are_named(unchecked):
    with pytest.raises(ValueError, match=r"module must be a torch.nn.Module, got <function"):
        models.from_torch(lambda x: x, (3, 4))
    with pytest.raises(ValueError, match=re.escape("example must be inputs or their shape (batch, ...), got (3, 0).")):
        models.from_torch(nn.Linear(4, 2), (3, 0))
    with pytest.raises(ValueError, match="example must be finite, got 12 that are not"):
        models.from_torch(nn.Linear(4, 2), np.full((3, 4), np.nan))


def test_a_torchax_that_does_not_import_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchax.tensor", None)
    _torch._environment.cache_clear()
    wanted = r'torchax must be importable, .*\(torch \d.*, torchax \d.*, jax \d.*\); pip install "robustjax\[torch\]"'
    with pytest.raises(ImportError, match=wanted):
        models.from_torch(nn.Linear(4, 2), (3, 4))


def test_global_settings_stay(monkeypatch):
    script = """
import os, jax, torch
from robustjax import models
settings = lambda: (dict(os.environ), dict(jax.config.values), torch.backends.mha.get_fastpath_enabled(),
    torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), torch.get_rng_state().tolist())
layer = torch.nn.Linear(4, 2)
before = settings()
models.from_torch(layer, (3, 4))
print(settings() == before, type(torch.zeros(1)).__name__)
"""
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, env=os.environ)
    assert result.stdout.split() == ["True", "Tensor"]


NETWORKS = {
    "resnet20": (lambda: ResNet((16, 32, 64), (3, 3, 3)), {}),
    "wide_resnet": (lambda: WideResNet(16, 2), {"depth": 16, "width": 2}),
    "resnet18": (lambda: ResNet((64, 128, 256, 512), (2, 2, 2, 2), large_stem=True), {}),
    "resnet50": (lambda: ResNet((64, 128, 256, 512), (3, 4, 6, 3), bottleneck=True, large_stem=True), {}),
    "resnet110": (lambda: ResNet((16, 32, 64), (18, 18, 18)), {}),
}


@pytest.mark.parametrize("size", [32, 33])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("resnet50", "resnet110") else n for n in NETWORKS]
)
def test_loaded_weights_give_the_outputs_of_pytorch(name, size, tmp_path):
    if size == 33 and name in ("resnet50", "resnet110"):
        pytest.skip("strides of odd sizes are seen in the smaller networks")
    build, settings = NETWORKS[name]
    network = made(build)
    # As nn.DataParallel names its tensors; itself it would look for devices that torchax has registered.
    parallel = nn.ModuleDict({"module": network})
    module = nn.Sequential(Normalised(), parallel if name == "resnet50" else network)
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({"arch": name, "epoch": 90, "state_dict": module.state_dict()}, path)
    settings |= {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010), "image_shape": (size, size, 3)}
    abstract = nnx.eval_shape(lambda: models.create(name, jax.random.key(0), **settings))
    model = models.functional(models.load_torch_weights(abstract, path))
    x = images(2, size)
    want = in_torch(nn.Sequential(Normalised(), network), x)[0]
    got = jax.jit(model.outputs)(model.state, x).logits
    np.testing.assert_allclose(got, want, atol=1e-4 * max(1, np.abs(want).max()))


def test_files_that_are_no_tensors_are_refused(tmp_path):
    abstract = nnx.eval_shape(lambda: models.wide_resnet(jax.random.key(0), depth=10, width=1))
    torch.save(WideResNet(10, 1), tmp_path / "module.pt")  # a module is code
    message = "a file of tensors and plain values, got .*module.pt: it holds code, .* save .*state_dict"
    with pytest.raises(ValueError, match=message):
        models.load_torch_weights(abstract, tmp_path / "module.pt")
    torch.save([torch.ones(3)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="weights must be a file of tensors by name, got list in .*list.pt"):
        models.load_torch_weights(abstract, tmp_path / "list.pt")


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
        lambda: nn.Conv2d(4, 6, 3, padding="same", bias=False),
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 2), (1, 0), groups=2, dilation=(2, 1), bias=False),
        lambda: nn.ConvTranspose2d(4, 8, 2, stride=2, groups=4),
    ],
    ids=["grouped", "same", "transposed", "transposed in groups", "transposed by channel"],
)
def test_convolutions_of_all_kinds_have_channels_last_inside(layer):
    torch.manual_seed(0)
    module, x = layer(), np.random.default_rng(0).random((2, 9, 9, 4), np.float32)
    function = models.from_torch(module, x)
    with torch.no_grad():
        want = module(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).numpy()
    np.testing.assert_allclose(function(x), np.moveaxis(want, 1, -1), atol=1e-5)
    text = jax.jit(function).lower(x).as_text()
    assert "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in text  # XLA for CPUs is slow with channels first


POOLS = {
    "max": nn.MaxPool2d(2),
    "max, strides": nn.MaxPool2d((3, 2), (1, 3), (1, 0)),
    "max, overlapping": nn.MaxPool2d(3, 2, 1),
    "max, dilated": nn.MaxPool2d(2, 2, 1, (3, 2), ceil_mode=True),
    "max, ceil": nn.MaxPool2d(2, ceil_mode=True),
    "max, ceil, no window in the padding": nn.MaxPool2d(2, 3, 1, ceil_mode=True),
    "max, unbatched": Applied(lambda x: torch.stack([nn.functional.max_pool2d(image, (2, 3)) for image in x])),
    "max, indices": Applied(lambda x: nn.functional.max_pool2d(x, 2, return_indices=True)[0]),
    "avg": nn.AvgPool2d(2),
    "avg, strides": nn.AvgPool2d((3, 2), (1, 3), (1, 0)),
    "avg, padding": nn.AvgPool2d(3, 2, 1),
    "avg, padding not counted": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "avg, ceil": nn.AvgPool2d((4, 3), (3, 2), 1, ceil_mode=True),
    "avg, ceil, padding not counted": nn.AvgPool2d((4, 3), (3, 2), 1, ceil_mode=True, count_include_pad=False),
    "avg, ceil, no window in the padding": nn.AvgPool2d(2, 3, 1, ceil_mode=True),
    "avg, divisor": nn.AvgPool2d((3, 2), padding=1, divisor_override=5),
    "adaptive": nn.AdaptiveAvgPool2d((3, 4)),
    "adaptive, to one": nn.AdaptiveAvgPool2d(1),
    "adaptive, unequal windows": nn.AdaptiveAvgPool2d((4, 3)),
}


@pytest.mark.parametrize("name", POOLS)
def test_pooling_is_that_of_pytorch_with_channels_last_inside(name):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 4, (2, 9, 8, 3)).astype(np.float32)  # ties, where the first maximum has the gradient
    function = models.from_torch(POOLS[name], x)
    inner = torch.from_numpy(np.moveaxis(x, -1, 1).copy()).requires_grad_()
    outputs = POOLS[name](inner)
    weights = rng.random(outputs.shape, np.float32)
    (outputs * torch.from_numpy(weights)).sum().backward()
    compiled = jax.jit(lambda x, weights: (lambda y, pull: (y, pull(weights)[0]))(*jax.vjp(function, x)))
    lowered = compiled.lower(x, np.moveaxis(weights, 1, -1))
    values, gradient = lowered.compile()(x, np.moveaxis(weights, 1, -1))
    np.testing.assert_allclose(values, np.moveaxis(outputs.detach().numpy(), 1, -1), rtol=1e-6)
    np.testing.assert_allclose(gradient, np.moveaxis(inner.grad.numpy(), 1, -1), rtol=1e-5, atol=1e-6)
    if name != "max, indices":  # torchax's
        assert "window_dimensions = array<i64: 1, 1, " not in lowered.as_text()


@pytest.mark.parametrize("name", ["max, overlapping", "avg, padding"])
def test_pooling_is_vectorised_and_looped_over(name):
    x = np.random.default_rng(0).integers(0, 4, (3, 2, 9, 8, 3)).astype(np.float32)
    function = models.from_torch(POOLS[name], x[0])
    gradient = jax.grad(lambda x: (function(x) ** 2).sum())
    want = [gradient(part) for part in x]
    np.testing.assert_allclose(jax.vmap(gradient)(x), want, rtol=1e-6)
    np.testing.assert_allclose(jax.lax.scan(lambda _, part: (None, gradient(part)), None, x)[1], want, rtol=1e-6)
    tangent = jnp.ones_like(x[0])
    slope = jax.jvp(lambda x: (function(x) ** 2).sum(), (x[0],), (tangent,))[1]
    np.testing.assert_allclose(slope, (want[0] * tangent).sum(), rtol=1e-5)


def test_a_missing_value_is_the_maximum_and_has_the_gradient_as_in_pytorch():
    x = np.arange(32, dtype=np.float32).reshape(2, 4, 4, 1)
    function, x[0, 0, 1], x[0, 1, 0] = models.from_torch(nn.MaxPool2d(2), x), np.nan, np.nan
    inner = torch.from_numpy(np.moveaxis(x, -1, 1).copy()).requires_grad_()
    nn.MaxPool2d(2)(inner).sum().backward()
    np.testing.assert_array_equal(np.isnan(function(x)).sum(), 1)
    got = jax.grad(lambda x: function(x).sum())(x)
    np.testing.assert_array_equal(got, np.moveaxis(inner.grad.numpy(), 1, -1))


@pytest.mark.parametrize("shape", [(4, 3), (4, 8, 8, 3)])
def test_an_example_that_is_not_writable_does_not_warn(shape, recwarn):
    module = nn.Linear(3, 2) if len(shape) == 2 else CNN()
    models.from_torch(module, jnp.zeros(shape))
    assert not [str(each.message) for each in recwarn if "writable" in str(each.message)]
