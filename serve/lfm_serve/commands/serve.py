"""`lfm-edge serve`: answer many clients over HTTP, with the API of OpenAI's chat completions."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lfm_runtime.commands.cli import add_setting_arguments, bundle_of, setting_flags
from lfm_runtime.errors import SettingError

if TYPE_CHECKING:
    from lfm_runtime.bundle import Bundle

PORT = 8080
KEYS = "LFM_EDGE_API_KEYS"
"""The environment variable for keys, one a line or with commas between, where no file has them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = "Answer questions about images over HTTP: OpenAI's chat completions, streamed or not."
    parser.add_argument("bundle", help="folder made by lfm-edge export, or an id of the hub: owner/name[@revision]")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on")
    parser.add_argument("--port", type=int, default=PORT, metavar="N")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help=f"clients' keys, one a line; or {KEYS}")
    parser.add_argument("--no-auth", action="store_true", help="listen beyond this machine without keys")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="a name of this machine")
    parser.add_argument(
        "--image-host", action="append", default=[], metavar="NAME", help="fetch images by URL from it; *.example.org"
    )
    parser.add_argument("--media-path", type=Path, metavar="DIR", help="open images by file URL below this folder")
    parser.add_argument(
        "--cors-origin", action="append", default=[], metavar="ORIGIN", help="a page that may ask: https://example.org"
    )
    parser.add_argument("--name", help="the model's id for clients; default: the checkpoint's name")
    parser.add_argument("--strict-model", action="store_true", help="refuse requests for a model of another name")
    parser.add_argument("--rows", type=int, metavar="N", help="answers at once; default: 4, 2 or 1, as memory allows")
    parser.add_argument("--context", type=int, metavar="N", help="tokens of prompt and answer for each (default 4096)")
    parser.add_argument("--queue", type=int, default=16, metavar="N", help="requests that may wait")
    parser.add_argument("--cache-mib", type=int, default=128, metavar="N", help="memory for what was read before")
    parser.add_argument("--max-megapixels", type=float, default=25.0, metavar="N", help="refuse larger images")
    parser.add_argument("--max-body-mib", type=int, default=64, metavar="N", help="refuse larger requests")
    parser.add_argument("--request-timeout", type=float, default=600.0, metavar="S", help="seconds for a whole answer")
    parser.add_argument(
        "--profile", default="", metavar="NAME", help="how to run: a name of lfm-edge profile list, or a .toml file"
    )
    parser.add_argument("--quiet", action="store_true", help="only errors")
    add_setting_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C, which let the requests that are there be answered; a second one does not."""
    from lfm_serve.steady import keep_memory_steady

    keep_memory_steady()  # before onnxruntime starts threads
    from lfm_serve.api.guard import keys_of, read_keys
    from lfm_serve.engine import Engine
    from lfm_serve.limits import Limits
    from lfm_serve.server import serve
    from lfm_serve.setup import choose

    keys = read_keys(options.api_key_file) if options.api_key_file else keys_of(os.environ.get(KEYS, ""), KEYS)
    _check(options, keys)
    logging.basicConfig(level=logging.WARNING if options.quiet else logging.INFO, format="%(message)s")
    flags = {name: value for name, value in setting_flags(options).items() if name not in ("context", "low_memory")}
    setup, rows = choose(
        bundle_of(options),
        options.profile,
        rows=options.rows,
        context=options.context,
        cache_mib=options.cache_mib,
        **flags,
    )
    for line in setup.reductions:
        print(f"lfm-edge: {line}", file=sys.stderr)
    engine = Engine(setup, rows=rows, waiting=options.queue, cache_mib=options.cache_mib)
    limits = Limits(
        max_body_mib=options.max_body_mib,
        max_megapixels=options.max_megapixels,
        request_s=options.request_timeout,
        strict_model=options.strict_model,
        image_hosts=tuple(options.image_host),
        media_path=options.media_path,
    )
    return serve(
        engine,
        limits,
        host=options.host,
        port=options.port,
        name=_name(setup.bundle) if options.name is None else options.name,
        keys=keys,
        anybody=options.no_auth,
        hosts=options.allow_host,
        origins=options.cors_origin,
        quiet=options.quiet,
    )


def _check(options: argparse.Namespace, keys: Sequence[bytes]) -> None:
    """Raise SettingError for what cannot be."""
    from lfm_serve.server import OPEN, is_loopback, resolved

    for name, least in (("rows", 1), ("context", 16), ("queue", 0), ("cache_mib", 0), ("max_body_mib", 1), ("port", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise SettingError(f"--{name.replace('_', '-')} {value} is impossible; allowed: {least} and above")
    if options.name is not None and not options.name.strip():
        raise SettingError("--name is empty; name the model as clients will, or leave it out")
    if options.port > 65535:
        raise SettingError(f"--port {options.port} is impossible; allowed: 0 (any that is free) to 65535")
    for name in ("request_timeout", "max_megapixels"):
        if not 0 < getattr(options, name) < float("inf"):
            raise SettingError(f"--{name.replace('_', '-')} {getattr(options, name):g} is impossible; allowed: above 0")
    for name in ("allow_host", "image_host"):
        for host in getattr(options, name):
            if not re.fullmatch(r"(\*\.)?[\w.-]+" if name == "image_host" else r"[\w.-]+", host):
                raise SettingError(f"--{name.replace('_', '-')} {host!r:.80} is no name of a host; write example.org")
    if options.media_path and not options.media_path.is_dir():
        raise SettingError(f"--media-path {options.media_path} is not a folder")
    for origin in options.cors_origin:
        if not re.fullmatch(r"https?://[^/\s]+", origin):
            raise SettingError(f"--cors-origin {origin!r:.80} is not an origin; write https://example.org")
    if options.low_memory:
        raise SettingError("--low-memory has no effect here: encoder and decoder stay loaded; leave it out")
    if "/" in options.host:
        raise SettingError(f"--host {options.host} is a path; name an address, or let systemd pass a socket")
    if keys and options.no_auth:
        where = "--api-key-file" if options.api_key_file else KEYS
        raise SettingError(f"--no-auth has no effect beside the keys of {where}; leave one out")
    if not (keys or options.no_auth or is_loopback(resolved(options.host, options.port)[-1])):
        raise SettingError(OPEN.format(options.host))  # before the model is looked at


def _name(bundle: Bundle) -> str:
    """The checkpoint's name; a hub folder's own."""
    return bundle.manifest.source.name if bundle.manifest else bundle.folder.resolve().name
