"""The options that limit what may be recommended, for all commands that decide."""

from __future__ import annotations

from typing import Annotated

import typer

MaxVram = Annotated[str | None, typer.Option(metavar="SIZE", help="Most device memory, e.g. 6GiB.")]
MaxRam = Annotated[str | None, typer.Option(metavar="SIZE", help="Most main memory, e.g. 800MiB.")]
MaxTtft = Annotated[str | None, typer.Option(metavar="[pN:]TIME", help="Longest time to first token, e.g. p95:300ms.")]
MaxTpot = Annotated[str | None, typer.Option(metavar="[pN:]TIME", help="Longest time per output token, e.g. 50ms.")]
MinDecodeTps = Annotated[
    str | None, typer.Option(metavar="[pN:]RATE", help="Least decode rate in tokens per second, e.g. 20.")
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        metavar="NATS",
        help="Most KL divergence of what loses output, if first choices agree in 99 % as well; default: 0.01.",
    ),
]
AllowLossy = Annotated[
    bool | None,
    typer.Option(
        "--allow-lossy/--no-allow-lossy",
        help="Recommend what loses output, however much, unless it is broken; default: the profile's, else not.",
    ),
]
MinContext = Annotated[int | None, typer.Option(metavar="N", min=1, help="Least tokens of prompt and output together.")]
