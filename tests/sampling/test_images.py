import torch
from PIL import Image

from dpt_t2i.sampling.images import letterbox, to_pil


def test_pixels_are_clamped_and_rounded():
    pixels = torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 7.0]).reshape(1, 1, 1, 6).expand(1, 3, 1, 6)
    (image,) = to_pil(pixels)
    # 0 -> 127.5, which rounds to the even 128; 0.5 -> 191.25
    assert [image.getpixel((x, 0))[0] for x in range(6)] == [0, 0, 128, 191, 255, 255]


def test_a_picture_of_the_right_size_goes_in_and_comes_out_unchanged():
    picture = Image.effect_noise((32, 32), 80).convert("RGB")
    pixels, placement = letterbox(picture, 32, 32)
    assert to_pil(pixels)[0].tobytes() == picture.tobytes()
    assert (placement.scale, placement.left, placement.top) == (1.0, 0, 0)


def test_a_wide_picture_is_padded_and_boxes_find_their_way_back():
    picture = Image.new("RGB", (64, 32), "white")
    pixels, placement = letterbox(picture, 32, 32)
    assert pixels.shape == (1, 3, 32, 32)
    assert (placement.scale, placement.left, placement.top) == (0.5, 0, 8)
    assert (pixels[0, :, 8:24] == 1).all()
    assert pixels[0, :, :8].abs().max() < 0.01 and pixels[0, :, 24:].abs().max() < 0.01
    box = placement.to_picture(torch.tensor([0.0, 8.0, 16.0, 24.0]))
    assert box.tolist() == [0.0, 0.0, 32.0, 32.0]
