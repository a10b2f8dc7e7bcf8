from __future__ import annotations

from PIL import Image

from components.generation.contact_sheet import contact_sheet


def test_contact_sheet_places_pictures_on_a_bounded_grid() -> None:
    pictures = [Image.new("RGB", (40, 20), "red"), Image.new("RGB", (20, 40), "blue")]
    sheet = contact_sheet(pictures, columns=2, cell_px=50)
    assert sheet.size == (2 * 62 + 12, 62 + 12)
    assert sheet.getpixel((12 + 25, 12 + 25)) == (255, 0, 0)
    assert sheet.getpixel((12 + 62 + 25, 12 + 25)) == (0, 0, 255)
    large = contact_sheet(pictures, columns=1, cell_px=900, max_px=512)
    assert max(large.size) == 512
