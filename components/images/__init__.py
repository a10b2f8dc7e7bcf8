"""What a picture is: decoding, sizes, storage, value ranges."""
