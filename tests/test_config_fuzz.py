"""Wrong configurations by the dozen: each ends in one line that names the parameter, and writes nothing.

Most are refused while the configuration is read or its parts are built; a few can only show in the first rollout. What
is wrong stands on the left, words that the line must contain on the right.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from framework.cli import main

HOME = Path(__file__).resolve().parent.parent
SHARED = ["train.prompts_per_step = 2", "held_out/scenes.ShapesCaptions.limit = 3", "evaluation.HeldOut.members = 1"]
SMALL = {
    "nft": [*SHARED, "noise_endpoint.NoiseEndpoint.window_blocks = 2", "noise_endpoint.NoiseEndpoint.group_size = 2"],
    "kvpo": [*SHARED, "causal_history_routing.CausalHistoryRouting.group_size = 2"],
}
FILES = {
    "a.txt": "a red circle moves left slowly\na cyan square moves up quickly\n",
    "overlap.txt": "a red circle moves left slowly\na blue square moves up quickly\n",
    "strange.txt": "a purple elephant\nanother one\n",
    "one.txt": "a red circle moves left slowly\n",
    "empty.txt": "\n  \n",
    "cut.txt": "a red circle moves left slowly [3f] | # a cyan square moves up quickly\n",
    "late.txt": "a red circle moves left slowly [5s] | a cyan square moves up quickly\na b\n",
    "extra.jsonl": '{"prompt": "a red circle moves left slowly", "video": "x"}\n',
    "broken.jsonl": '{"prompt": \n',
    "loop.gin": "include 'back.gin'\n",
    "back.gin": "include 'loop.gin'\n",
    "binary.gin": b"\xff\xfe\x00train.seed = 1",
    "weights.safetensors": b"not tensors",
}

NFT = r"""
nft.NFT.bta = 1.0                                   | nft.NFT | 'bta' | beta
nftt.NFT.beta = 1.0                                 | nftt.NFT | nft.NFT
SURROGATE = @nft.NFTT()                             | nft.NFTT | nft.NFT
SURROGATE = @nft.NFT                                | write () behind it
SURROGATE = @shapes.ShapesReward()                  | train.surrogate | SurrogatePolicy
nft.NFT = 3                                         | nft.NFT is a part | beta
@nft.NFT() = 3                                      | cannot read
nft.NFT.beta = 0                                    | NFT.beta | positive
nft.NFT.beta = 1e999                                | NFT.beta | finite
nft.NFT.beta = '1'                                  | nft.NFT.beta must be float
nft.NFT.space = 'w'                                 | NFT.space
nft.NFT.advantage_limit = 0                         | NFT.advantage_limit
nft.NFT.noisy_streams = 0                           | NFT.noisy_streams
nft.NFT.history_grad = 1                            | nft.NFT.history_grad must be bool
nft.NFT.level_weights = (1, 1)                      | NFT.level_weights | 4 levels
nft.NFT.level_weights = (1, -1, 1, 1)               | NFT.level_weights
nft.NFT.level_weights = (0, 1, 1, 1e999)            | NFT.level_weights | finite
nft.NFT.level_weights = ('a', 1, 1, 1)              | nft.NFT.level_weights
noise_endpoint.NoiseEndpoint.group_size = 1         | NoiseEndpoint.group_size=1
noise_endpoint.NoiseEndpoint.group_size = 2.5       | noise_endpoint.NoiseEndpoint.group_size must be int
noise_endpoint.NoiseEndpoint.window_blocks = 8      | NoiseEndpoint.window_blocks=8 | stream_blocks
noise_endpoint.NoiseEndpoint.window_blocks = 0      | NoiseEndpoint.window_blocks
noise_endpoint.NoiseEndpoint.stream_blocks = -1     | NoiseEndpoint.stream_blocks
noise_endpoint.NoiseEndpoint.layout = @noise_endpoint.OneOf()                                             | OneOf.blocks
noise_endpoint.NoiseEndpoint.layout = @noise_endpoint.OneOf(); noise_endpoint.OneOf.blocks = (9,)         | OneOf.blocks
noise_endpoint.NoiseEndpoint.layout = @noise_endpoint.Anywhere(); noise_endpoint.Anywhere.earliest = 99   | earliest=99
noise_endpoint.NoiseEndpoint.kernel = @kernels.Consistency(); kernels.Consistency.eta = 0                 | eta | Ode
noise_endpoint.NoiseEndpoint.kernel = @kernels.FlowGRPO(); kernels.FlowGRPO.noise_level = 1e999           | noise_level
optimization.AdamW.learning_rat = 1e-4              | learning_rat | did you mean 'learning_rate'
optimization.AdamW.learning_rate = 0                | AdamW.learning_rate
optimization.AdamW.learning_rate = 'fast'           | learning_rate must be float | 'fast'
optimization.AdamW.learning_rate = 1e999            | AdamW.learning_rate | finite
optimization.AdamW.beta1 = 1.5                      | AdamW.beta1
optimization.AdamW.beta2 = -0.1                     | beta2
optimization.AdamW.eps = 0.0                        | AdamW.eps
optimization.AdamW.weight_decay = -1.0              | weight_decay
optimization.AdamW.max_grad_norm = 0                | AdamW.max_grad_norm
optimization.AdamW.lr_warmup_steps = -5             | AdamW.lr_warmup_steps
adapters.LoRA.rank = 0                              | LoRA.rank
adapters.LoRA.alpha = 0                             | LoRA.alpha
adapters.LoRA.target_modules = ()                   | LoRA.target_modules | to_q
adapters.LoRA.target_modules = 'to_q'               | target_modules must be Sequence[str]
adapters.LoRA.target_modules = ('to_q', 'to_nothing') | LoRA.target_modules | ['to_nothing'] | to_q
train.prompts_per_step = 0                          | prompts_per_step=0
train.prompts_per_step = 1000                       | prompts_per_step=1000 | 120
train.updates_per_rollout = 0                       | train.updates_per_rollout
train.micro_batch_size = 0                          | train.micro_batch_size
train.micro_batch_size = 3; noise_endpoint.NoiseEndpoint.group_size = 4 | micro_batch_size=3 | group size
train.max_steps = -1                                | train.max_steps
train.max_steps = 2 * 3                             | cannot read | no arithmetic
train.max_steps = %STEPS                            | %STEPS | not defined
train.max_steps = %gin.REQUIRED                     | train.max_steps is required
STEPS = %STEPS; train.max_steps = %STEPS            | built from itself
STEPS = 3                                           | STEPS is bound but never used
max_steps = 3                                       | max_steps is bound but never used
train.seed = -1                                     | train.seed
train.seed = 1e3                                    | train.seed must be int
train.seed = 99999999999999999999999                | train.seed
train.seed = None                                   | train.seed must be int
train.seed = os.getcwd()                            | cannot read | Python literals
train.average_decay = 1.5                           | train.average_decay
train.replay_tolerance = 1e999                      | train.replay_tolerance
train.threads = 0                                   | threads
train.device = 'gpu'                                | device='gpu' | --device
train.device = ''                                   | device='' | --device
train.behaviour_decay = 0.5                         | train.behaviour_decay must be Schedule
train.behaviour_decay = @optimization.Ramp(); optimization.Ramp.cap = 3.0    | Ramp.rate | cap
train.behaviour_decay = @optimization.Ramp(); optimization.Ramp.rate = -1.0  | Ramp.rate
train.optimizer = None                              | train.optimizer must be AdamW
train.generator = @shapes.ShapesReward()            | train.generator must be StreamingGenerator
train.reference = @reference.Dynamic()              | Dynamic | EndpointShift
train.regularizer = @branch_kl.BranchKL()           | BranchKL reads BranchLogits
train.regularizer = @kernel_kl.KernelKL()           | KernelKL reads KernelShift
velocity_kl.VelocityKL.weight = 0.1                 | velocity_kl.VelocityKL.weight is bound but never used
REGULARIZER = @velocity_kl.VelocityKL(); velocity_kl.VelocityKL.weight = -1.0    | VelocityKL.weight
REGULARIZER = @velocity_kl.VelocityKL(); velocity_kl.VelocityKL.weight = 1e999   | VelocityKL.weight
REGULARIZER = @selective_kl.SelectiveKL(); selective_kl.SelectiveKL.primary = 'XX'; selective_kl.SelectiveKL.auxiliaries = ('MQ',) | SelectiveKL | 'XX' | 'VQ'
REGULARIZER = @selective_kl.SelectiveKL(); selective_kl.SelectiveKL.primary = 'VQ'; selective_kl.SelectiveKL.auxiliaries = () | SelectiveKL.auxiliaries
REGULARIZER = @several.Several(); several.Several.parts = ()           | Several.parts
SURROGATE = @gibbs_tve.GibbsTVE()                   | GibbsTVE reads Anchors | NoiseEndpoint
SURROGATE = @gaussian_kernel.GaussianRatio(); noise_endpoint.NoiseEndpoint.kernel = @kernels.Ode() | GaussianRatio reads Transitions | Ode
ADVANTAGE = @anchored_advantages.AnchorCentred()    | AnchorCentred reads Anchors
ADVANTAGE = @advantages.PrimaryOnly()               | advantages.PrimaryOnly.primary
ADVANTAGE = @advantages.PrimaryOnly(); advantages.PrimaryOnly.primary = 'XX'     | 'XX' | 'VQ'
advantages.PerRewardCentred.weights = {'XX': 1.0}   | weights | 'XX' | 'VQ'
advantages.PerRewardCentred.weights = {}            | weights
advantages.PerRewardCentred.weights = {'VQ': 1e999} | weights | finite
advantages.PerRewardCentred.weights = {'VQ': 'a'}   | advantages.PerRewardCentred.weights must be
advantages.PerRewardCentred.clip = -1.0             | clip=-1.0
REWARD = @composite.CompositeReward(); composite.CompositeReward.models = ()     | CompositeReward.models
REWARD = @composite.CompositeReward(); composite.CompositeReward.models = [@shapes.ShapesReward(), @shapes.ShapesReward()] | given twice
REWARD = @random_control.RandomReward(); random_control.RandomReward.names = ()  | RandomReward.names
evaluation.HeldOut.members = 0                      | HeldOut.members
evaluation.HeldOut.blocks = 0                       | HeldOut.blocks
evaluation.HeldOut.first_block = -1                 | HeldOut.first_block
evaluation.HeldOut.seed = -3                        | HeldOut.seed
held_out/scenes.ShapesCaptions.limit = 1            | at least 2
held_uot/scenes.ShapesCaptions.limit = 3            | did you mean 'held_out'
held_out/scenes.ShapesCaptions.held_out = False     | both trained on and judged
held_out/scenes.ShapesCaptions.held_out_count = 0   | held_out_count=0
train.scenes = @scenes.PromptFile()                 | scenes.PromptFile.path
train.scenes = @scenes.PromptFile(); scenes.PromptFile.path = 'HERE/nowhere.txt'   | PromptFile.path | nowhere.txt
train.scenes = @scenes.PromptFile(); scenes.PromptFile.path = 'HERE'               | PromptFile.path | is not a file
train.scenes = @scenes.PromptFile(); scenes.PromptFile.path = 'HERE/empty.txt'     | PromptFile.path | empty
train.scenes = @scenes.PromptFile(); scenes.PromptFile.path = 'HERE/one.txt'       | prompts_per_step=2 | 1 … 1
train.scenes = @scenes.PromptFile(); scenes.PromptFile.path = 'HERE/cut.txt'       | cut.txt:1 | '#'
train.scenes = @scenes.PromptFile(); scenes.PromptFile.path = 'HERE/late.txt'      | late.txt:1 | latent_fps
train.scenes = @scenes.PromptFile(); scenes.PromptFile.path = 'HERE/extra.jsonl'   | extra.jsonl:1 | 'video'
train.scenes = @scenes.PromptFile(); scenes.PromptFile.path = 'HERE/broken.jsonl'  | broken.jsonl:1 | JSON
train.scenes = @scenes.PromptFile(); scenes.PromptFile.path = 'HERE/strange.txt'   | a purple elephant
train.scenes = @scenes.PromptFile(); scenes.PromptFile.path = 'HERE/a.txt'; evaluation.HeldOut.scenes = @h/scenes.PromptFile(); h/scenes.PromptFile.path = 'HERE/overlap.txt' | both trained on and judged | a red circle
embedded.packaged_generator.checkpoint = 'HERE/nowhere.safetensors'                | checkpoint | nowhere.safetensors
embedded.packaged_generator.checkpoint = 'HERE/weights.safetensors'                | weights.safetensors | whole
embedded.packaged_generator.checkpoint = 7          | checkpoint must be str
embedded.packaged_generator.policy = @scenes.ShapesCaptions()  | policy must be HistoryPolicy
include 'HERE/nowhere.gin'                          | nowhere.gin | there is no file
include 'HERE/loop.gin'                             | includes itself | loop.gin → back.gin → loop.gin
include 'HERE/binary.gin'                           | binary.gin | cannot be read
include 7                                           | cannot read
import no_such_module                               | no_such_module | cannot be imported
"""  # noqa: E501

KVPO = r"""
causal_history_routing.CausalHistoryRouting.group_size = 1       | CausalHistoryRouting.group_size=1
causal_history_routing.CausalHistoryRouting.routed_frames = 0    | CausalHistoryRouting.routed_frames
causal_history_routing.CausalHistoryRouting.sink = 500           | CausalHistoryRouting | no pivot
causal_history_routing.CausalHistoryRouting.routed_blocks = 99   | no pivot | routed_blocks
causal_history_routing.CausalHistoryRouting.tail_blocks = -1     | CausalHistoryRouting.tail_blocks
causal_history_routing.CausalHistoryRouting.stream_blocks = 3    | no pivot | stream_blocks
causal_history_routing.CausalHistoryRouting.steps = (True,)      | CausalHistoryRouting.steps | 4 steps
causal_history_routing.CausalHistoryRouting.steps = 'first'      | steps must be Sequence[bool]
causal_history_routing.CausalHistoryRouting.resident = 1         | CausalHistoryRouting.resident=1
causal_history_routing.CausalHistoryRouting.draw = @kernels.Ode() | draw must be RouteDraw
gibbs_tve.GibbsTVE.clip_low = 2.0                                | GibbsTVE.clip_low
gibbs_tve.GibbsTVE.clip_high = -1.0                              | GibbsTVE.clip_high
gibbs_tve.GibbsTVE.temperature = 0.1                             | temperature must be Temperature
gibbs_tve.GibbsTVE.temperature = @gibbs_tve.FixedTemperature(); gibbs_tve.FixedTemperature.value = 0 | FixedTemperature.value
SURROGATE = @gaussian_kernel.GaussianReinforce()                 | GaussianReinforce reads OnPolicyTransitions
"""  # noqa: E501


def read_cases(base: str, table: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """(base, bindings, words) of every line."""
    split = [[part.strip() for part in line.split(" | ")] for line in table.strip().splitlines()]
    return [(base, wrong, tuple(words)) for wrong, *words in split]


CASES = [*read_cases("nft", NFT), *read_cases("kvpo", KVPO)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files lie that some cases name."""
    folder = tmp_path_factory.mktemp("files")
    for name, text in FILES.items():
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def arguments(base: str, wrong: str, files: Path, output: Path) -> list[str]:
    """The command line of a training run with something wrong in it."""
    params = [*SMALL[base], *wrong.replace("HERE", str(files)).split("; ")]
    flags = [flag for param in params for flag in ("--gin_param", param)]
    return ["train", "--gin_file", f"embedded/{base}.gin", "--output_dir", str(output), *flags]


def test_there_are_more_than_sixty_and_no_two_are_alike() -> None:
    assert len(CASES) >= 60 and len({(base, wrong) for base, wrong, _ in CASES}) == len(CASES)
    assert all(words and all(words) for _, _, words in CASES)


def check_refusal(code: int, out: str, err: str, words: tuple[str, ...], output: Path) -> None:
    """One line with these words on stderr, an exit status, nothing on disk."""
    lines = [line for line in err.splitlines() if line.strip()]
    assert code in (1, 2) and len(lines) == 1 and lines[0].startswith("armillary: error: "), err
    assert "Traceback" not in out + err and " object at 0x" not in err
    assert all(word in lines[0] for word in words), lines[0]
    assert not output.exists(), "a refused run must leave its folder free"


@pytest.mark.parametrize(("base", "wrong", "words"), CASES, ids=[f"{b}:{w[:60]}" for b, w, _ in CASES])
def test_a_wrong_configuration_is_one_line_that_names_the_cause(
    base: str, wrong: str, words: tuple[str, ...], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(arguments(base, wrong, files, tmp_path / "run"))
    check_refusal(code, *capsys.readouterr(), words, tmp_path / "run")


@pytest.mark.parametrize("number", [0, 3, 7, 61])
def test_the_console_refuses_alike(number: int, files: Path, tmp_path: Path) -> None:
    base, wrong, words = CASES[number]
    command = [sys.executable, "-m", "framework", *arguments(base, wrong, files, tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(HOME)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    check_refusal(done.returncode, done.stdout, done.stderr, words, tmp_path / "run")


@pytest.mark.parametrize(
    ("code", "err", "written"),
    [
        (0, "", False),
        (1, "armillary: error: other\n", False),
        (1, "Traceback (most recent call last):\narmillary: error: NFT.beta\n", False),
        (1, "armillary: error: NFT.beta <object object at 0x7f>\n", False),
        (1, "armillary: error: NFT.beta\n", True),
    ],
)
def test_the_check_of_a_refusal_can_fail(code: int, err: str, written: bool, tmp_path: Path) -> None:
    if written:
        (tmp_path / "run").mkdir()
    with pytest.raises(AssertionError):
        check_refusal(code, "", err, ("NFT.beta",), tmp_path / "run")
