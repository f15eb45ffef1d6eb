"""The server program. ``tools/serve.py`` is its main."""

from __future__ import annotations

import argparse
from dataclasses import fields

from emu3_megatron.errors import UserError
from emu3_megatron.inference.checks import check_single_process
from emu3_megatron.inference.command_line import add_model, open_generator
from emu3_megatron.inference.dialogue import chat_template
from emu3_megatron.inference.server.limits import Limits

LOCAL = ("localhost", "127.0.0.1", "::1")
"""Addresses that only this machine reaches."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Serve a model: a web page, and OpenAI's interface for images and chat.",
        allow_abbrev=False,
    )
    add_model(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    parser.add_argument("--name", default="emu3", help="the model's name for clients (default: emu3)")
    parser.add_argument(
        "--template",
        default="emu3-chat",
        help="name, or text with {media} and {question} (default: emu3-chat)",
    )
    limits = parser.add_argument_group(
        "limits", "What one client may ask; docs/serving.md says what each bounds."
    )
    for field in fields(Limits):
        kind = type(field.default)
        limits.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    return parser


def main() -> None:
    """Parse the command line, open the model and serve until interrupted."""
    arguments = build_parser().parse_args()
    check_single_process("serve.py")
    limits = Limits(**{field.name: getattr(arguments, field.name) for field in fields(Limits)})
    template = chat_template(arguments.template)
    try:
        import uvicorn

        from emu3_megatron.inference.server.app import LOCAL_HOSTS, create_app
        from emu3_megatron.inference.server.reading import reading_protocol
    except ImportError as error:
        raise UserError(
            f"{error.name} is missing; install the extra: pip install 'emu3-megatron[serve]'"
        ) from error
    from emu3_megatron.parallel import platform
    from emu3_megatron.parallel.config import ParallelConfig
    from emu3_megatron.parallel.groups import initialize_parallel

    initialize_parallel(ParallelConfig(), platform.install(arguments.platform), seed=0)
    hosts = LOCAL_HOSTS if arguments.host in LOCAL else ("*",)
    app = create_app(
        open_generator(arguments, max_rows=limits.rows),
        limits=limits,
        template=template,
        model_name=arguments.name,
        hosts=hosts,
    )
    uvicorn.run(
        app,
        host=arguments.host,
        port=arguments.port,
        http=reading_protocol(limits.send_seconds),
        timeout_graceful_shutdown=5,
    )
