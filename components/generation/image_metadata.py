"""What made a picture, inside the picture: PNG text chunks, or XMP and EXIF in a JPEG.

Fields are names and texts. In a PNG each is an iTXt chunk. In a JPEG all of them stand as one JSON
object in the XMP packet (namespace below) and, for programs that read EXIF only, the prompt is the
ImageDescription and the version the Software. No file carries a date.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from components.files.whole_files import NotRegularFile, regular_bytes, whole_file

FileFormat = Literal["png", "jpg"]
JPEG_QUALITY = 95
_NAMESPACE = "https://ultraflux.invalid/generation/1.0/"
# A JPEG segment holds 65,535 bytes; the packet's frame and its signature need some of them.
_XMP_LIMIT_BYTES = 64_000
_PACKET = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:ultraflux="{namespace}" ultraflux:generation="{data}"/>'
    "</rdf:RDF></x:xmpmeta>"
)
_GENERATION = re.compile(rb'ultraflux:generation="([A-Za-z0-9+/=]*)"')
_IMAGE_DESCRIPTION, _SOFTWARE = 0x010E, 0x0131


def software_version() -> str:
    """Name and version of this project, as written into pictures."""
    try:
        return f"ultraflux-mlops {version('ultraflux-mlops')}"
    except PackageNotFoundError:
        return "ultraflux-mlops (not installed)"


def save_with_metadata(
    image: Image.Image, path: Path, fields: Mapping[str, str], file_format: FileFormat = "png"
) -> None:
    """Write a picture under a temporary name and rename it; same inputs, same bytes.

    Args:
        image: RGB.
        path: target, whatever its ending.
        fields: what to embed.
        file_format: png (lossless) or jpg (quality 95, full chroma resolution).

    Raises:
        ValueError: more text than a JPEG can hold.
    """
    options: dict[str, Any]
    if file_format == "png":
        notes = PngImagePlugin.PngInfo()
        for name, text in fields.items():
            notes.add_itxt(name, text)
        options = {"format": "PNG", "pnginfo": notes}
    else:
        # Base64: no character of a prompt can break the XML.
        data = base64.b64encode(json.dumps(dict(fields)).encode()).decode("ascii")
        packet = _PACKET.format(namespace=_NAMESPACE, data=data).encode()
        if len(packet) > _XMP_LIMIT_BYTES:
            raise ValueError(
                f"{path.name}: {len(packet)} bytes of metadata do not fit into a JPEG; "
                "write PNG or shorten the prompt"
            )
        exif = Image.Exif()
        exif[_IMAGE_DESCRIPTION] = fields.get("prompt", "")
        exif[_SOFTWARE] = fields.get("software", software_version())
        image = image.convert("RGB")
        options = {"format": "JPEG", "quality": JPEG_QUALITY, "subsampling": 0}
        options |= {"exif": exif, "xmp": packet}
    with whole_file(path, contended=True) as temporary:
        image.save(temporary, **options)


def read_metadata(path: Path) -> dict[str, str]:
    """The fields of a picture that `save_with_metadata` wrote; empty for other pictures.

    Raises:
        ValueError: not a readable picture.
    """
    try:
        with Image.open(io.BytesIO(regular_bytes(path))) as image:
            image.load()
            info = dict(image.info)
            is_png = image.format == "PNG"
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except NotRegularFile as problem:
        raise ValueError(f"{path}: {problem.strerror}") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not a readable picture") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:
        raise ValueError(f"{path}: not a readable picture ({problem})") from None
    if is_png:
        return {str(name): str(text) for name, text in info.items() if isinstance(text, str)}
    packet = info.get("xmp", b"")
    found = _GENERATION.search(packet if isinstance(packet, bytes) else b"")
    if found is None:
        return {}
    try:
        fields = json.loads(base64.b64decode(found[1]))
    except ValueError:
        return {}
    return {str(k): str(v) for k, v in fields.items()} if isinstance(fields, dict) else {}
