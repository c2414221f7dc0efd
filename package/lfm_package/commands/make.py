"""`lfm-edge make`: from a checkpoint to a stick: export, quantize what the board's profile uses, write the stick."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lfm_package.commands.wheelhouse import add_target_arguments

if TYPE_CHECKING:
    from lfm_package.make import Order

NOT_GOOD_ENOUGH = 3
"""Exit code of quantize for a variant below the floor."""
_NEEDED = ("onnx_ir", "jinja2", "tokenizers", "onnx", "packaging", "cyclonedx")
"""What the commands of the steps import."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the description of `parser` and add the command's arguments."""
    parser.description = (
        "Export a checkpoint, quantize the variants that the board's profile uses, and write a stick. Says first how "
        "long each step takes and how much memory. The same command goes on after the last finished step."
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="folder with config.json, safetensors and tokenizer files, or an id of the hub: owner/name[@revision]",
    )
    add_target_arguments(parser)
    parser.add_argument("--adapter", type=Path, metavar="LORA_DIR", help="PEFT LoRA adapter to merge into the weights")
    parser.add_argument(
        "--calibration",
        type=Path,
        nargs="+",
        default=[],
        metavar="IMAGES",
        help="a few dozen images, as for lfm-edge quantize",
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="questions about them, as for lfm-edge quantize")
    parser.add_argument("--quick", action="store_true", help="quantize in a few minutes, as lfm-edge quantize --quick")
    parser.add_argument("--profile", default="", metavar="NAME", help="profile of the board; default: the target's own")
    parser.add_argument("--sign", type=Path, metavar="KEY", help="sign the stick with this SSH key (ssh-keygen -Y)")
    parser.add_argument("--golden", type=Path, metavar="FILE.jsonl", help="questions that selftest asks on the board")
    parser.add_argument("--bundle", type=Path, metavar="FOLDER", help="keep the bundle here; default: OUTPUT-bundle")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FOLDER", help="or NAME.tar")
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace the stick of another board, or a signed one, and variants that were made with more images",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(options: argparse.Namespace) -> int:
    """Print the plan, do what is not done yet, and return 0 or the exit code of the step that failed."""
    from lfm_runtime.commands.cli import interrupt_on_termination
    from lfm_runtime.errors import command

    from lfm_package.estimate import table
    from lfm_package.make import Done, steps_of

    order = _order(options)
    steps, done = steps_of(order), Done(order.bundle)
    if done.damage:
        print(f"lfm-edge: {done.damage}", file=sys.stderr)
    left = [step for step in steps if not done.has(step)]

    def say(text: str) -> None:
        if not options.quiet:
            print(text, file=sys.stderr, flush=True)

    say("" if options.quiet else table(order, left))
    interrupt_on_termination()
    for number, step in enumerate(steps, 1):
        what = f"lfm-edge {step.words[0]}" if step in left else "done before"
        say(f"\n{number} of {len(steps)}, {step.name}: {what}")
        if step not in left:
            continue
        try:
            code = step.run()
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; the same command goes on after the last finished step") from None
        if code:
            how = "once that is mended, the same command goes on from there"
            if code == NOT_GOOD_ENOUGH and order.quick:
                how = "the same command without --quick goes on from there"
            elif code == NOT_GOOD_ENOUGH:
                how = f"once it is made in another way, go on with: {command(*steps[-1].words)}"
            print(f"lfm-edge: make stopped at {step.name}; {how}", file=sys.stderr)
            return code
        done.add(step)
    if order.calibration and order.changes_images():
        words = ["quality", str(order.bundle), "--profile", order.profile, "--images", str(order.calibration[0])]
        say(f"profile {order.board.name} shows the model less of an image than the checkpoint asks for; what that and")
        say(f"the variant cost together, with other images better: {command(*words)}")
    return 0


def _order(options: argparse.Namespace) -> Order:
    """What is to be made; everything that a later step would refuse is refused here."""
    from lfm_runtime.errors import SettingError
    from lfm_runtime.installation import install_advice
    from lfm_runtime.setup.hub import adapter_folder, checkpoint_folder
    from lfm_runtime.setup.profile import find_profile

    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        advice = install_advice("export,quantize,package")
        raise SettingError(f"make needs the Python package {missing[0]}; install what it uses with: {advice}")
    from lfm_package.make import Order
    from lfm_package.signature import check_key
    from lfm_package.stick import check_place, check_profile
    from lfm_package.targets import Platform

    platform = Platform.of(options.target, options.python)
    profile = options.profile or platform.target.profile
    check_profile(find_profile(profile), platform)
    if options.sign:
        check_key(options.sign)
    if (options.checkpoint / "manifest.json").exists():
        raise SettingError(
            f"{options.checkpoint} is a bundle, and make starts from a checkpoint; "
            "of a bundle: lfm-edge quantize, then lfm-edge stick"
        )
    options.checkpoint = checkpoint_folder(options.checkpoint, quiet=options.quiet)
    if not (options.checkpoint / "config.json").exists():
        what = "is no checkpoint, it has no config.json" if options.checkpoint.exists() else "does not exist"
        raise SettingError(f"{options.checkpoint} {what}; name a checkpoint's folder, or its id")
    options.adapter = adapter_folder(options.adapter, quiet=options.quiet) if options.adapter else None
    _check_inputs(options)
    check_place(options.output, platform, signed=bool(options.sign), force=options.force)
    name = options.output.name.removesuffix(".tar")
    bundle = options.bundle or options.output.with_name(f"{name}-bundle")
    if bundle.resolve() == options.output.resolve():
        raise SettingError(f"{bundle} is named twice, for the bundle and for the stick; choose another --bundle")
    words = ["--target", options.target]
    for flag in ("python", "profile", "sign", "golden"):
        if value := getattr(options, flag):
            words += [f"--{flag}", str(value)]
    words += [word for extra in options.extra for word in ("--extra", extra)]
    return Order(
        checkpoint=options.checkpoint,
        bundle=bundle,
        output=options.output,
        profile=profile,
        adapter=options.adapter,
        calibration=tuple(options.calibration),
        prompts=options.prompts,
        quick=options.quick,
        quiet=options.quiet,
        force=options.force,
        stick=tuple(words),
    )


def _check_inputs(options: argparse.Namespace) -> None:
    """Raise SettingError for images and files that are missing, damaged or of no effect."""
    from lfm_runtime.errors import SettingError
    from lfm_runtime.questions import read_jsonl

    from lfm_package.estimate import count_images

    for path in (*options.calibration, options.adapter, options.prompts, options.golden):
        if path is not None and not path.exists():
            raise SettingError(f"{path} does not exist; check the path")
    for flag, given in (("--quick", options.quick), ("--prompts", options.prompts)):
        if given and not options.calibration:
            raise SettingError(f"{flag} has no effect without --calibration; name images, or leave it out")
    if options.golden:
        read_jsonl(options.golden, [options.golden.parent])
    if options.calibration and not count_images(options.calibration):
        raise SettingError(f"{options.calibration[0]} has no images; name a folder with JPEG or PNG files")
