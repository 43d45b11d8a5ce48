"""Options that several commands that train have in common, each a decorator."""

from __future__ import annotations

import click

teachers = click.option("--teachers", metavar="CKPT CKPT ...", multiple=True, help="Checkpoints, as PATH or ARCH:PATH.")
student = click.option("--student", metavar="ARCH", help="Architecture of the student (kdcompress ls models).")
data = click.option(
    "--data", metavar="DATA", help="A folder, a .zip or .tar of one, digits, cifar10:ROOT, imagenet:ROOT …"
)
unlabeled = click.option("--unlabeled", metavar="DIR", help="More images, without labels.")
holdout = click.option(
    "--holdout", metavar="DIR", help="Labelled images that no teacher has seen; gates are fitted on them."
)
force = click.option(
    "--force",
    flag_value=True,
    type=bool,
    default=None,
    help="Learn weights of the teachers also from labels of images that they were trained on.",
)
init = click.option(
    "--init", metavar="START", help="auto, pretrained, teacher, teacher:N, random, or a checkpoint file."
)
