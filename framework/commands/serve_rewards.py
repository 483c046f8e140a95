"""The root that offers a reward model to runs in other processes and on other machines."""

import socket

import torch

from framework.config.registry import one_line
from framework.interfaces import RewardModel
from framework.reporting.progress import say
from framework.serving.access import is_loopback, read_token
from framework.serving.scoring import Limits
from framework.serving.service import ProbeClip, RewardService, build_app


def serve_rewards(
    *,
    reward: RewardModel,
    host: str = "127.0.0.1",
    port: int = 8100,
    token_file: str | None = None,
    probe: ProbeClip | None = None,
    limits: Limits | None = None,
    threads: int | None = None,
) -> None:
    """Score what is asked over HTTP until a signal comes; see docs/serving.md.

    host: who can reach it; anything but this machine needs a token. port: 0 for a free one, which is printed.
    token_file: its text is what clients have to bring. probe: the clip of the self-test. threads: CPU threads, None for
    torch's choice.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise ValueError("serving rewards needs uvicorn: pip install 'armillary[serve]'") from error
    token = None if token_file is None else read_token(token_file)
    if token is None and not is_loopback(host):
        raise ValueError(
            f"serve_rewards.host={host!r} is reached from other machines: give a --token_file, or leave it 127.0.0.1"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    service = RewardService(reward, probe, limits)
    app = build_app(service, token)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family) as listening:
            place = f"[{host}]" if ":" in host else host
            say(f"reward {type(reward).__name__} gives {', '.join(reward.signals)}; digest {service.digest}")
            say(f"listening on http://{place}:{listening.getsockname()[1]}")
            config = uvicorn.Config(
                app, log_level="warning", access_log=False, timeout_keep_alive=75, timeout_graceful_shutdown=10,
                limit_concurrency=2 * service.limits.waiting + 16,
            )  # fmt: skip
            uvicorn.Server(config).run(sockets=[listening])
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on {host}:{port}: {one_line(error)}; give another --host or --port") from error
    finally:
        service.queue.close()
