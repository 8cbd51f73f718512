"""CRC-32 of payloads, with the polynomial of zlib."""

try:
    from isal.isal_zlib import crc32  # in [server]; beside an engine whoever wants it installs it
except ImportError:
    from zlib import crc32

__all__ = ["crc32"]
