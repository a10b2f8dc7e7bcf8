"""Files that are wrong in every way we know, and some that only look so, with the right answers.

    python benchmarks/bad_files.py FOLDER [--per-kind 12]

writes them below FOLDER, the same bytes every time. The tests send them through `ultraflux stage
run` and ask for the reason that stands beside each kind; `corpus_walkthrough.py` prints what each
kind ends as.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bad_bytes import (
    Make,
    animated,
    avif,
    between_scans,
    box,
    broken,
    broken_header,
    broken_palette,
    camera_raw,
    chunk,
    cut,
    cut_in_header,
    document,
    encoded,
    exif,
    flipped,
    foreign_profile,
    frame,
    gif_cut,
    half,
    header,
    heif,
    inflating,
    jpeg,
    jpeg_cut,
    jxl,
    made,
    mpo,
    nonsense_exif,
    over_noise,
    overwritten,
    picture,
    png,
    png_bomb,
    png_cut,
    png_flipped,
    png_of,
    png_with,
    saved_as_text,
    sent_as_text,
    sixteen_bit,
    sixteen_bit_colour,
    sized_zero,
    text_bomb,
    tiff_cut,
    tiff_fields,
    tiff_offsets,
    values,
    webp_cut,
    with_nan,
    without_segment,
)

EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".gif", ".bmp"),
    *(".avif", ".jxl", ".heic", ".heif"),
)
PER_KIND = 12


@dataclass(frozen=True)
class Kind:
    """One way of being wrong."""

    endings: tuple[str, ...]
    """Taken in turn."""
    make: Make
    answer: str = "ok"
    """Pattern that `integrity` of a row must match, whole."""
    note: str = ""
    """Pattern that must be found in `decode_note` of rows that are ok."""


JPG, PNG, TIF, WEBP, GIF, AVIF = (".jpg",), (".png",), (".tif",), (".webp",), (".gif",), (".avif",)
ENDS = "{} that ends before its pixels"
PIXELS = r"cannot decode: .*|corrupt jpeg data: .*|premature end of jpeg file"
TOO_LARGE = r"too large: \d+x\d+ is [\d.]+ megapixels, limit 1"
NEEDS = "{} needs a decoder that is not installed: {}"
BAD_AVIF = r"not an image that PIL knows \(AVIF that is cut or damaged\)|cannot decode: .*"


def unknown(what: str) -> str:
    """Pattern of the answer for what opens as no picture."""
    return rf"not an image that PIL knows \({what}\)"


KINDS: dict[str, Kind] = {
    # JPEG.
    "jpeg cut in its header": Kind(
        JPG, lambda rng: cut_in_header(jpeg(rng), b"\xff\xc0", rng), f".*{ENDS.format('JPEG')}.*"
    ),
    "jpeg cut in its pixels": Kind(JPG, jpeg_cut, PIXELS),
    "jpeg progressive cut": Kind(JPG, lambda rng: jpeg_cut(rng, progressive=True), PIXELS),
    "jpeg progressive, scans missing": Kind(JPG, between_scans, ".* scans are missing"),
    "jpeg without its last two bytes": Kind(JPG, lambda rng: jpeg(rng)[:-2], note="no end marker"),
    "jpeg overwritten": Kind(JPG, lambda rng: overwritten(jpeg(rng), rng), PIXELS),
    # A flipped bit may be another right picture: nothing in a JPEG can tell.
    "jpeg flipped": Kind(JPG, lambda rng: flipped(jpeg(rng), rng, 600), f"ok|{PIXELS}"),
    # As the frames of Motion JPEG: the tables of the standard are meant.
    "jpeg without huffman tables": Kind(JPG, without_segment(0xC4)),
    "jpeg without quantisation": Kind(JPG, without_segment(0xDB), PIXELS),
    "jpeg trailing garbage": Kind(JPG, lambda rng: jpeg(rng) + rng.bytes(500)),
    "jpeg of no size": Kind(JPG, sized_zero, unknown("JPEG of (50x0|0x50) pixels")),
    "jpeg head alone": Kind(
        JPG, lambda rng: b"\xff\xd8\xff" + rng.bytes(2), unknown(ENDS.format("JPEG"))
    ),
    "jpeg of 12 bits": Kind(
        JPG, lambda rng: frame(rng, marker=0xC1, precision=12), unknown("JPEG of 12 bits .*")
    ),
    "jpeg without loss": Kind(
        JPG, lambda rng: frame(rng, marker=0xC3), ".*lossless JPEG: convert it.*"
    ),
    "jpeg-ls": Kind(JPG, lambda rng: frame(rng, marker=0xF7), unknown("JPEG-LS: convert it")),
    "jpeg of gigapixels": Kind(JPG, lambda rng: frame(rng, height=65500, width=65500), TOO_LARGE),
    "jpeg taller than its pixels": Kind(JPG, lambda rng: frame(rng, height=900), PIXELS),
    "jpeg as text": Kind(JPG, saved_as_text, unknown("bytes that were saved as text .*")),
    "jpeg in gzip": Kind(
        JPG,
        lambda rng: gzip.compress(jpeg(rng), mtime=0),
        unknown(r"compressed \(gzip\): unpack it"),
    ),
    "jpeg in base64": Kind(
        JPG,
        lambda rng: b"data:image/jpeg;base64," * int(rng.integers(2)) + base64.b64encode(jpeg(rng)),
        unknown("base64 text: decode it"),
    ),
    "gray jpeg": Kind(JPG, made("JPEG", "L")),
    "mpo": Kind(JPG, mpo, note="first of 2 frames"),
    "cmyk": Kind(JPG, made("JPEG", "CMYK"), note="CMYK without a profile"),
    "cmyk cut": Kind(JPG, lambda rng: jpeg_cut(rng, mode="CMYK"), PIXELS),
    "cmyk overwritten": Kind(
        JPG, lambda rng: overwritten(encoded(picture(rng, "CMYK"), "JPEG"), rng), PIXELS
    ),
    "turned by exif": Kind(JPG, exif(orientation="any")),
    "turned by 9": Kind(JPG, exif(orientation=9), note="orientation 9 does not exist"),
    "huge exif": Kind(JPG, lambda rng: jpeg(rng, exif=b"Exif\0\0" + rng.bytes(65_000))),
    "exif of nonsense": Kind(JPG, nonsense_exif),
    "broken icc": Kind(
        JPG, lambda rng: jpeg(rng, icc_profile=rng.bytes(3000)), note="broken colour profile"
    ),
    "icc of other colours": Kind(JPG, foreign_profile, note="profile for Lab not applied"),
    "wrong ending": Kind((".png", ".tif", ".webp"), jpeg),
    # PNG.
    "png cut in its header": Kind(
        PNG,
        lambda rng: cut_in_header(png(rng), b"IDAT", rng),
        f"(.*PNG chunk IHDR: cut.*|.*{ENDS.format('PNG')}.*)",
    ),
    "png cut in its pixels": Kind(PNG, png_cut, ".*PNG chunk IDAT: cut.*"),
    "png flipped": Kind(PNG, png_flipped, ".*PNG chunk IDAT: wrong checksum.*"),
    "png without IEND": Kind(PNG, lambda rng: png(rng)[:-12], note="IEND"),
    "png without IDAT": Kind(
        PNG, lambda rng: header(50, 40) + chunk(b"IEND", b""), f".*{ENDS.format('PNG')}.*"
    ),
    "png, comment broken": Kind(
        PNG, png_with(broken(b"tEXt")), note="broken PNG chunk tEXt left out"
    ),
    "png, profile broken": Kind(
        PNG, png_with(broken(b"iCCP")), note="broken PNG chunk iCCP left out"
    ),
    "png, palette broken": Kind(PNG, broken_palette, ".*PNG chunk PLTE: wrong checksum.*"),
    "png, header broken": Kind(PNG, broken_header, ".*PNG chunk IHDR: wrong checksum.*"),
    "png, unknown critical chunk": Kind(
        PNG, png_with(lambda rng: chunk(b"CgBI", rng.bytes(4))), "PNG chunk CgBI: critical.*"
    ),
    "png of noise": Kind(PNG, png_of(40, 50, lambda rng: rng.bytes(900)), "cannot decode: .*"),
    "png too short": Kind(PNG, png_of(40, 50, half), "PNG whose pixels end before the last row"),
    "png too long": Kind(PNG, png_of(40, 50, inflating)),
    "png of no size": Kind(
        PNG, lambda rng: header(0, 40) + chunk(b"IDAT", rng.bytes(9)), unknown("PNG of 40x0 pixels")
    ),
    "png as text": Kind(PNG, sent_as_text, unknown("PNG that was sent as text: .*")),
    "png bomb": Kind(PNG, png_bomb, TOO_LARGE),
    "png text bomb": Kind(PNG, png_with(text_bomb), ".*Decompressed data too large.*"),
    "16 bit": Kind(PNG, sixteen_bit),
    "16 bit colour": Kind(PNG, sixteen_bit_colour),
    "palette": Kind(PNG, made("PNG", "P"), note="P converted to RGB"),
    "palette with transparency": Kind(PNG, made("PNG", "P", transparency=3)),
    "1 bit": Kind((".png", ".tif"), made("PNG", "1")),
    "alpha": Kind((".png", ".webp"), made("PNG", "RGBA")),
    "gray with alpha": Kind(PNG, made("PNG", "LA")),
    "apng": Kind(PNG, animated("PNG"), note="first of 3 frames"),
    # TIFF.
    "tiff cut": Kind(TIF, tiff_cut, "cannot decode: image file is truncated.*"),
    "tiff offsets": Kind(TIF, tiff_offsets, unknown("TIFF with a damaged header")),
    "tiff fields": Kind((".tiff",), tiff_fields, f"{unknown('TIFF .*')}|cannot decode: .*|ok"),
    "tiff of fractions": Kind(TIF, values(lambda rng: rng.random((50, 60), dtype=np.float32))),
    "tiff of fractions with holes": Kind(TIF, values(with_nan)),
    "tiff of 32 bits": Kind(
        TIF,
        values(lambda rng: rng.integers(0, 2**31, (50, 60), dtype=np.int32)),
        note="scaled to its own range",
    ),
    "tiff lzw": Kind(TIF, made("TIFF", compression="tiff_lzw")),
    "tiff cmyk": Kind(TIF, made("TIFF", "CMYK"), note="CMYK"),
    "tiff pages": Kind(TIF, animated("TIFF"), note="first of 3 frames"),
    "bigtiff": Kind(TIF, made("TIFF", big_tiff=True)),
    "camera raw": Kind(TIF, camera_raw, "camera raw: develop it; .*"),
    # WebP, GIF, BMP, AVIF.
    "webp": Kind(WEBP, made("WEBP")),
    "webp lossless with alpha": Kind(WEBP, made("WEBP", "RGBA", lossless=True)),
    "webp cut": Kind(WEBP, webp_cut, r"cannot decode: .* \(WebP that ends early\)"),
    "animated webp": Kind(WEBP, animated("WEBP"), note="first of 3 frames"),
    "gif": Kind(GIF, made("GIF", "P")),
    "gif cut": Kind(GIF, gif_cut, "cannot decode: image file is truncated.*"),
    "animated gif": Kind(GIF, animated("GIF"), note="first of 3 frames"),
    "bmp": Kind((".bmp",), made("BMP")),
    "bmp cut": Kind(
        (".bmp",),
        lambda rng: cut(encoded(picture(rng), "BMP"), rng, 60),
        "cannot decode: image file is truncated.*",
    ),
    "avif": Kind(AVIF, avif),
    "avif cut": Kind(AVIF, lambda rng: cut(avif(rng), rng, 40), BAD_AVIF),
    # AV1 has no checksums.
    "avif flipped": Kind(AVIF, lambda rng: flipped(avif(rng), rng), f"ok|{BAD_AVIF}"),
    "avif head alone": Kind(AVIF, lambda rng: avif(rng)[:32] + rng.bytes(300), BAD_AVIF),
    "avif in disguise": Kind((".jpg", ".heic"), avif),
    # What needs another program, or is no picture.
    "jxl of noise": Kind((".jxl", ".jpg"), jxl, NEEDS.format("JXL", "pillow-jxl-plugin")),
    "heif of noise": Kind((".heic", ".heif"), heif, NEEDS.format("HEIF", "pillow-heif")),
    "heif in disguise": Kind(JPG, heif, NEEDS.format("HEIF", "pillow-heif")),
    "jpeg 2000": Kind(
        JPG,
        over_noise(b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
        unknown("JPEG 2000: convert it"),
    ),
    "photoshop": Kind(JPG, over_noise(b"8BPS\0\1"), unknown("Photoshop document: .*")),
    "raw of a camera": Kind(
        (".jpg", ".tif"),
        over_noise(b"FUJIFILMCCD-RAW ", b"II*\0\x10\0\0\0CR\2\0", b"IIRO\x08\0"),
        unknown("camera raw: develop it"),
    ),
    "icon": Kind(JPG, over_noise(b"\0\0\1\0\1\0"), unknown("icon")),
    "hdr": Kind(
        JPG, over_noise(b"#?RADIANCE\n", b"v/1\1"), unknown("(Radiance HDR|OpenEXR): convert it")
    ),
    "video": Kind((".jpg", ".avif", ".webp"), box(b"isom", b"mp42"), unknown("video")),
    "avi": Kind(WEBP, over_noise(b"RIFF\x60\2\0\0AVI "), unknown("video")),
    "pdf": Kind(JPG, over_noise(b"%PDF-1.7\n"), unknown("PDF document")),
    "archive": Kind(
        JPG,
        over_noise(b"PK\3\4\x14\0", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\7"),
        unknown(r"archive \((ZIP|7z|RAR)\): unpack it"),
    ),
    "svg": Kind(
        (".jpg", ".png"),
        document(
            '<svg xmlns="http://www.w3.org/2000/svg">', '<?xml version="1.0"?>\n<!-- a -->\n<svg>'
        ),
        unknown("SVG drawing: vectors, no pixels"),
    ),
    "html": Kind(
        EXTENSIONS,
        document("<!DOCTYPE html>", "\n<html lang='en'>", "\ufeff<!-- x --><HTML>"),
        unknown("HTML page"),
    ),
    "json": Kind(
        JPG,
        lambda rng: b'{"error": "not found", "id": %d}' % rng.integers(10**9),
        unknown("text"),
    ),
    "text": Kind(
        EXTENSIONS, document("404 not found", "Zugriff verweigert: f\u00fcr Sie"), unknown("text")
    ),
    "pointer of git lfs": Kind(
        JPG,
        lambda rng: (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:%064x\nsize 9\n"
            % int(rng.integers(2**62))
        ),
        unknown("pointer of Git LFS, .*"),
    ),
    # Starts no interpreter.
    "postscript": Kind(
        JPG,
        lambda rng: b"%%!PS-Adobe-3.0 EPSF-3.0\n%%%%BoundingBox: 0 0 50 %d\n" % rng.integers(9, 99),
        unknown("PostScript"),
    ),
    "empty": Kind(EXTENSIONS, lambda rng: b"", r"empty file \(0 bytes\)"),
    "zero bytes": Kind(
        EXTENSIONS, lambda rng: bytes(int(rng.integers(1, 5000))), unknown("zero bytes alone")
    ),
    "noise": Kind(
        EXTENSIONS,
        lambda rng: rng.bytes(int(rng.integers(64, 5000))),
        "not an image that PIL knows",
    ),
    # Sound, and small.
    "one pixel": Kind(PNG, lambda rng: encoded(picture(rng).resize((1, 1)), "PNG")),
    "one line": Kind(JPG, lambda rng: encoded(picture(rng).resize((300, 1)), "JPEG")),
}


def make_files(photos: Path, per_kind: int = PER_KIND) -> dict[str, str]:
    """Kind by file below `photos`, without the file system's own tricks."""
    kinds: dict[str, str] = {}
    for number, (name, kind) in enumerate(KINDS.items()):
        folder = photos / re.sub("[^a-z0-9]+", "-", name.lower())
        folder.mkdir(parents=True)
        for n in range(per_kind):
            path = folder / f"{n:02}{kind.endings[n % len(kind.endings)]}"
            path.write_bytes(kind.make(np.random.default_rng([number, n])))
            kinds[path.relative_to(photos).as_posix()] = name
    return kinds


def main() -> None:
    parser = argparse.ArgumentParser(description="Write files that are wrong in known ways.")
    parser.add_argument("folder", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--per-kind", type=int, default=PER_KIND)
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} exists; name a new folder")
    kinds = make_files(options.folder, options.per_kind)
    print(f"{len(kinds)} files of {len(KINDS)} kinds below {options.folder}")


if __name__ == "__main__":
    main()
