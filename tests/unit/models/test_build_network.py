from __future__ import annotations

import pytest
import torch
from torch import nn

from kdcompress.errors import DownloadError, InputError, ShapeError
from kdcompress.models import OWN_NETWORKS, build_network, list_networks, published_weights, weightless


@pytest.mark.parametrize("name", OWN_NETWORKS)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
def test_own_networks_take_small_images_of_any_channels(name: str, channels: int, size: int) -> None:
    network = build_network(name, num_classes=7, in_channels=channels, image_size=size).eval()
    images = torch.rand(3, channels, size, size)
    assert network(images).shape == (3, 7)


@pytest.mark.parametrize("name", ["resnet18", "torchvision/mobilenet_v3_small", "squeezenet1_1", "timm/resnet10t"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_other_libraries_networks_get_this_head_and_these_channels(name: str, channels: int) -> None:
    network = build_network(name, num_classes=7, in_channels=channels).eval()
    assert network(torch.rand(2, channels, 64, 64)).shape == (2, 7)


def test_vision_transformer_is_built_for_the_image_size() -> None:
    assert build_network("vit_b_32", num_classes=3, image_size=64).eval()(torch.rand(1, 3, 64, 64)).shape == (1, 3)
    small = build_network("timm/vit_tiny_patch16_224", num_classes=3, image_size=32).eval()
    assert small(torch.rand(1, 3, 32, 32)).shape == (1, 3)
    with pytest.raises(ShapeError, match="65 × 65"):
        build_network("vit_b_32", num_classes=3, image_size=65)


def test_parameters_of_the_published_architecture() -> None:
    # He et al. 2016, table 6, and the files by akamaster: 0.27, 0.46, 0.66, 0.85 and 1.7 million
    wanted = {
        "resnet20": 269_722,
        "resnet32": 464_154,
        "resnet44": 658_586,
        "resnet56": 853_018,
        "resnet110": 1_727_962,
    }
    for name, number in wanted.items():
        with weightless():
            network = build_network(name, num_classes=10)
        assert sum(parameter.numel() for parameter in network.parameters()) == number


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet21", "resnet"),
        ("mobilnet_v2", "mobilenet_v2"),
        ("timm/resnet19", "resnet18"),
        ("torchvision/vgg12", "vgg"),
    ],
)
def test_unknown_name_suggests_the_nearest(name: str, near: str) -> None:
    with pytest.raises(InputError, match=f"did you mean '.*{near}"):
        build_network(name, num_classes=2)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet20", {"widht": 8}, "did you mean 'width'"),
        ("vgg8", {"width": 0}, "from 1 on, not 0"),
        ("dscnn", {"width": "8"}, "whole number"),
        ("resnet18", {"widht": 8}, "does not take the arguments"),
        ("timm/resnet10t", {"widht": 8}, "does not take the arguments"),
        ("resnet20", {"pretrained": True}, "nobody publishes"),
    ],
)
def test_arguments_that_a_network_does_not_take(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_network(name, num_classes=2, **arguments)  # type: ignore[arg-type]


def test_width_scales_every_stage() -> None:
    network = build_network("resnet8", num_classes=2, width=4)
    assert network.get_submodule("layer3.0.conv2").weight.shape == (16, 16, 3, 3)


def test_networks_are_built_without_memory() -> None:
    for name in ("resnet56", "vgg8", "dscnn", "vgg11", "regnet_x_400mf", "swin_t", "vit_b_32", "densenet121"):
        assert name in list_networks()
        with weightless():
            network = build_network(name, num_classes=5)
        assert all(parameter.is_meta for parameter in network.parameters()), name


def test_published_weights_say_where_they_come_from_and_how_they_were_normalised() -> None:
    published = published_weights("resnet18")
    assert published is not None
    assert published.url.startswith("https://")
    assert (published.num_classes, published.image_size) == (1000, 224)
    assert published.mean == (0.485, 0.456, 0.406)
    assert "BSD" in published.licence
    swag = published_weights("regnet_y_128gf")
    assert swag is not None
    assert "SWAG" in swag.licence
    vit = published_weights("timm/vit_tiny_patch16_224")
    assert vit is not None
    assert (vit.mean, vit.licence) == ((0.5, 0.5, 0.5), "apache-2.0")
    assert published_weights("resnet20") is None
    with pytest.raises(InputError, match="unknown network"):
        published_weights("resnet21")


@pytest.fixture
def cache(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> object:
    """An empty download cache, and no way to the network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


@pytest.mark.usefixtures("cache")
def test_download_that_fails_names_offline_and_init() -> None:
    with pytest.raises(DownloadError, match="could not be fetched") as caught:
        build_network("squeezenet1_1", num_classes=5, pretrained=True)
    assert "--offline" in caught.value.fix
    assert "--init" in caught.value.fix
    assert caught.value.where.startswith("https://")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("num_classes", [5, 1000])
@pytest.mark.parametrize("name", ["densenet121", "squeezenet1_1", "googlenet"])
def test_published_weights_in_the_cache_are_used(name: str, num_classes: int) -> None:
    import torchvision.models as zoo

    auxiliary = {"init_weights": False} if name == "googlenet" else {}
    source = zoo.get_model(name, weights=None, **auxiliary)
    published = published_weights(name)
    assert published is not None
    assert not published.cached
    folder = torch.hub.get_dir() + "/checkpoints"
    torch.hub.os.makedirs(folder)
    torch.save(source.state_dict(), f"{folder}/{published.url.rsplit('/', 1)[1]}")
    assert (again := published_weights(name)) is not None
    assert again.cached

    network = build_network(name, num_classes=num_classes, pretrained=True)
    copied = source.state_dict()
    head = list(network.state_dict())[-1].rpartition(".")[0]
    for key, tensor in network.state_dict().items():
        if not key.startswith(head) or num_classes == 1000:
            assert torch.equal(tensor, copied[key]), key
    assert network.eval()(torch.rand(1, 3, 64, 64)).shape == (1, num_classes)


def test_first_convolution_for_other_channels_answers_alike_on_grey_pictures() -> None:
    from kdcompress.models.base import with_input_channels

    conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    grey = torch.rand(2, 1, 9, 9)
    for channels in (1, 2, 4, 5):
        adapted = with_input_channels(conv, channels)
        expected = conv(grey.expand(-1, 3, -1, -1))
        torch.testing.assert_close(adapted(grey.expand(-1, channels, -1, -1)), expected)
