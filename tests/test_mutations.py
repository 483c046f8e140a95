"""A table of errors that methods of this kind are known for, each seen by a property that the project states anyway.

Sign, factor, missing detach, wrong level, swapped policies, masks, gates, normalisers: a row names the error, the
function it is planted in, the text that changes, and the property that must fail. The same property must hold on the
code as it is, so a row proves that the property looks at what it is called after.
"""

from typing import Any

import pytest

from strategies.exploration.causal_history_routing import CausalHistoryRouting
from strategies.surrogates.gibbs_tve import AutoTemperature
from strategies.surrogates.transitions import AllSteps
from tests.framework.test_advantages import RULES
from tests.framework.test_anchored_advantages import RULES as ANCHORED
from tests.framework.test_policies import COUPLED, SEPARATE
from tests.mutation import Mutation, function_at, mutated, run_property
from tests.strategies.test_routing import recipe_of

NFT, GIBBS = "strategies.surrogates.nft", "strategies.surrogates.gibbs_tve"
GAUSSIAN, SELECTIVE = "strategies.surrogates.gaussian_kernel", "strategies.regularizers.selective_kl"
TESTS = "tests.strategies.test_"
IN_FRAMEWORK = "tests.framework.test_"

MUTATIONS = (
    # the NFT surrogate
    Mutation("winners and losers exchanged", f"{NFT}:nft_loss",
             "r * positive + (1 - r) * negative", "(1 - r) * positive + r * negative", "theory_checks.nft_gradient"),
    Mutation("the negative branch attracts", f"{NFT}:implicit_policies",
             "(1 + beta) * old - beta * current", "(1 - beta) * old + beta * current",
             "theory_checks.nft_improvement"),
    Mutation("the loss is not divided by β", f"{NFT}:NFT.objective", " / self.beta", "",
             f"{TESTS}nft:test_beta_changes_nothing_but_the_proximal_pull"),
    Mutation("current and old policy exchanged", f"{NFT}:NFT.statistics",
             'views["current"], views["behaviour"]', 'views["behaviour"], views["current"]',
             f"{TESTS}nft:test_the_objective_has_the_derived_gradient_in_both_spaces", ("v",)),
    Mutation("σ in place of σ² between the spaces", f"{NFT}:NFT.statistics",
             "weight * scale.square()", "weight * scale",
             f"{TESTS}nft:test_the_x0_loss_is_sigma_squared_times_the_velocity_loss"),
    Mutation("the branches' weights keep their graph", f"{NFT}:NFT.statistics",
             "current.detach(), old, self.beta", "current, old, self.beta",
             f"{TESTS}branch_weights:test_the_weights_carry_no_gradient"),
    Mutation("preferences off ½", f"{NFT}:preference", "+ 0.5", "+ 0.6", "theory_checks.advantage_centring"),
    # advantages
    Mutation("rewards are not centred", "framework.advantages:centre",
             "raised - group_mean(raised, groups, valid)", "raised", "theory_checks.group_integrity"),
    Mutation("centred over the batch", "framework.advantages:group_mean",
             "_, index = groups.unique(return_inverse=True)", "index = torch.zeros_like(groups)",
             f"{IN_FRAMEWORK}advantages:test_advantages_sum_to_zero_in_every_group", (RULES["centred"],)),
    Mutation("variance in place of the deviation", "framework.advantages:group_std",
             ".square(), groups, valid).sqrt()", ".square(), groups, valid)",
             f"{IN_FRAMEWORK}raven_advantages:test_every_reward_may_be_scaled_and_shifted_alone"),
    Mutation("one winner anywhere opens every prompt", "framework.anchored_advantages:AnyBranchBeatsAnchor.__call__",
             "branches).double(), groups)", "branches).double(), torch.zeros_like(groups))",
             f"{IN_FRAMEWORK}anchored_advantages:test_a_prompt_whose_branches_all_lose_to_the_anchor_is_silent",
             (ANCHORED["centred"],)),
    # selective KL
    Mutation("the mask is inverted where it is paid", f"{SELECTIVE}:SelectiveKL.penalty",
             "self.weight * marks", "self.weight * (1 - marks)", "theory_checks.selective_trust_region"),
    Mutation("the under-rated are flagged", f"{SELECTIVE}:OverRated.__call__", "flag(gap)", "flag(-gap)",
             f"{TESTS}selective_kl:test_a_planted_hack_of_four_clips_is_masked_exactly"),
    Mutation("a percentile per prompt", f"{SELECTIVE}:SelectiveKL.prepare",
             'return gap > risk_threshold(positive, used["risk_ratio"])',
             "return torch.cat([gap[ranked == g] > risk_threshold(gap[(ranked == g) & (gap >= 0)], "
             'used["risk_ratio"]) for g in ranked.unique()])',
             f"{TESTS}selective_kl:test_the_ratio_is_a_share_of_the_non_negative_gaps_of_the_whole_step"),
    Mutation("ranks across prompts", f"{SELECTIVE}:midranks",
             "siblings = groups[:, None] == groups", "siblings = groups[:, None] >= 0",
             f"{TESTS}selective_kl:test_how_easy_a_prompt_is_does_not_reach_the_mask"),
    Mutation("divided by the flagged clips alone", "strategies.regularizers.velocity_kl:batch_normalised",
             "/ len(values)", "/ mask.sum()", f"{TESTS}regularizers:test_a_lone_marked_clip_weighs_one_over_the_batch"),
    # Gibbs policies
    Mutation("the anchor is in the softmax", f"{GIBBS}:siblings", ") & branches", ")",
             f"{TESTS}gibbs_policy:test_probabilities_are_positive_and_sum_to_one_in_every_group"),
    Mutation("a temperature of each policy's own", f"{GIBBS}:GibbsTVE.objective",
             "log_gibbs(e, tau, groups, branches) for e in (energy, old)",
             "log_gibbs(e, self.temperature(e.detach(), groups, branches), groups, branches) for e in (energy, old)",
             f"{TESTS}gibbs_tve:test_one_temperature_without_gradient_serves_all_policies", (AutoTemperature(),)),
    Mutation("high energies are likelier", f"{GIBBS}:log_gibbs", "logits = -(", "logits = (",
             "theory_checks.gibbs_normalisation"),
    Mutation("energies are summed over elements", f"{GIBBS}:trajectory_velocity_energy",
             ".flatten(2).mean(2)", ".flatten(2).sum(2)", "theory_checks.gibbs_contrast"),
    Mutation("a mean over steps as well as elements", f"{GIBBS}:trajectory_velocity_energy",
             ".flatten(2).mean(2)", ".flatten(1).mean(1, keepdim=True)",
             f"{TESTS}gibbs_policy:test_the_energy_is_a_mean_over_blocks_and_dimensions"),
    Mutation("the old policy is differentiated", f"{GIBBS}:branch_ratio", "log_prob_old.detach()", "log_prob_old",
             "theory_checks.gibbs_contrast"),
    Mutation("the ratio is clipped on the wrong side", f"{GIBBS}:clipped_surrogate",
             "torch.minimum(", "torch.maximum(", "theory_checks.clip_regions"),
    Mutation("the branch KL in the other direction", "strategies.regularizers.branch_kl:branch_kl",
             "current.exp() * (inside - reference)", "reference.exp() * (reference - inside)",
             "theory_checks.closed_form_kls"),
    Mutation("branches draw noise of their own",
             "strategies.exploration.causal_history_routing:CausalHistoryRouting.plan",
             "BranchPlan(seed, Route(", "BranchPlan(seed + sum(frames), Route(",
             f"{TESTS}routing:test_branches_differ_in_their_route_and_groups_share_their_pivot",
             ((CausalHistoryRouting(routed_blocks=2), recipe_of()), 0)),
    # Gaussian steps
    Mutation("std in place of the variance", f"{GAUSSIAN}:log_density", "2 * std.square()", "2 * std",
             "theory_checks.kernel_score"),
    Mutation("a pull of twice the size", f"{GAUSSIAN}:score_pull", "2 * std.square()", "std.square()",
             "theory_checks.kernel_score"),
    Mutation("no half in the KL of a step", f"{GAUSSIAN}:kernel_divergence", "(2 * std.square())", "std.square()",
             "theory_checks.kernel_kl"),
    Mutation("a KL that is not a number", f"{GAUSSIAN}:kernel_divergence", "(2 * std.square())", "(0 * std / 0 / std)",
             "theory_checks.kernel_kl"),
    Mutation("PPO's larger loss taken for its smaller", f"{GAUSSIAN}:clipped_ratio_loss",
             "torch.maximum(", "torch.minimum(",
             f"{TESTS}gaussian_kernel:test_the_clip_acts_only_where_the_update_has_gone_far_enough"),
    Mutation("the point mass of the last step is trained", "strategies.surrogates.transitions:stochastic_steps",
             "if transitions.kernel.std(*pair) > 0", "if transitions.kernel.std(*pair) >= 0",
             f"{TESTS}transitions:test_a_point_mass_is_never_chosen_and_a_stochastic_last_step_is", (AllSteps(), 3)),
    # kernels and flow
    Mutation("x̂0 at the next level", "framework.kernels:Consistency.mean",
             "x0_from_velocity(x, velocity, sigma)", "x0_from_velocity(x, velocity, sigma_next)",
             "theory_checks.consistency_kernel"),
    Mutation("η σ' in place of σ' sin(η π/2)", "framework.kernels:Consistency.std",
             "sigma_next * math.sin(self.eta * math.pi / 2)", "sigma_next * self.eta",
             f"{IN_FRAMEWORK}kernels:test_the_deviations_of_the_shipped_grid_are_those_of_the_table"),
    Mutation("all of the noise is kept beside fresh noise", "framework.kernels:Consistency.mean",
             "- self.std(sigma, sigma_next) ** 2", "- 0.0", "theory_checks.consistency_kernel"),
    Mutation("the score term has the other sign", "framework.kernels:EulerMaruyama.coefficients",
             "(2 * sigma)", "(-2 * sigma)", "theory_checks.euler_maruyama"),
    Mutation("σ in place of 1 − σ", "framework.flow:noise_from_velocity", "(1 - sigma)", "sigma",
             "theory_checks.exact_denoiser"),
    # history
    Mutation("history is always detached", "backbones.streaming:WanStreamingGenerator.replay",
             "nullcontext() if probes.history_grad else torch.no_grad()", "torch.no_grad()",
             "theory_checks.history_gradient"),
    Mutation("history is never detached", "backbones.streaming:WanStreamingGenerator.replay",
             "nullcontext() if probes.history_grad else torch.no_grad()", "nullcontext()",
             "theory_checks.history_gradient"),
    Mutation("the context is noisy", "backbones.streaming:WanStreamingGenerator._encode_clean",
             "probes.clean[:, :, : plan.frames]", "probes.noisy[:, 0, :, : plan.frames]",
             "theory_checks.packed_cached"),
    Mutation("noisy blocks are asked as if they were clean", "backbones.streaming:WanStreamingGenerator._predict_noisy",
             "(1000 * sigma.to(widest))", "(0 * sigma.to(widest))", "theory_checks.packed_cached"),
    Mutation("block weights are not normalised", "framework.block_weights:block_weights",
             "w * sum(frames) / total", "float(w)", "theory_checks.participation_weights"),
    # the update
    Mutation("a gate of one half", "framework.trainer:combine",
             "active.to(loss.per_clip)", "(1 + active.to(loss.per_clip)) / 2",
             f"{IN_FRAMEWORK}trainer:test_a_gated_clip_contributes_exactly_nothing"),
    Mutation("the penalty is outside the gate", "framework.trainer:combine",
             "(loss.per_clip + penalty) * gate", "loss.per_clip * gate + penalty",
             f"{IN_FRAMEWORK}trainer:test_a_gated_clip_contributes_exactly_nothing"),
    Mutation("a normaliser per micro-batch", "framework.policies:Policies.backward",
             "(result.per_clip.sum() / total).backward()", "result.per_clip.mean().backward()",
             f"{IN_FRAMEWORK}policies:test_the_gradient_does_not_depend_on_the_micro_batch", (2, False, SEPARATE)),
    Mutation("siblings of other micro-batches are not met", "framework.policies:Policies.backward",
             "not loss.coupled or len(parts) == 1", "True",
             f"{IN_FRAMEWORK}policies:test_the_gradient_does_not_depend_on_the_micro_batch", (1, False, COUPLED)),
    Mutation("the reference is the current policy", "framework.policies:Policies.views",
             "self.use(name)", "self.use(CURRENT)",
             f"{IN_FRAMEWORK}policies:test_a_view_is_the_replay_under_its_policy", (True,)),
    Mutation("a reset reference stays where it was", "framework.policies:Policies.reset_reference",
             "self.parameters, 0.0", "self.parameters, 1.0",
             f"{IN_FRAMEWORK}policies:test_resetting_the_reference_moves_it_to_the_current_policy"),
    Mutation("the student moves away from the teacher", "strategies.distillation.dmd:dmd_gradient",
             "(critic_x0 - teacher_x0) / scale", "(teacher_x0 - critic_x0) / scale",
             f"{TESTS}distillation:test_the_distillation_gradient_is_the_published_formula"),
)  # fmt: skip


def named(row: Mutation) -> str:
    return row.name.replace(" ", "-")


@pytest.mark.parametrize("row", MUTATIONS, ids=named)
def test_a_planted_error_is_seen_by_the_property_that_is_named_for_it(row: Mutation) -> None:
    with mutated(row.target, row.old, row.new), pytest.raises(AssertionError):
        run_property(row.killer, row.arguments)


@pytest.mark.parametrize("row", {(m.killer, repr(m.arguments)): m for m in MUTATIONS}.values(), ids=lambda m: m.killer)
def test_the_property_holds_on_the_code_as_it_is(row: Mutation) -> None:
    run_property(row.killer, row.arguments)


def test_the_table_names_many_errors_once_each() -> None:
    assert len({row.name for row in MUTATIONS}) == len(MUTATIONS) >= 20
    assert len({(row.target, row.old, row.new) for row in MUTATIONS}) == len(MUTATIONS)


def test_a_mutation_leaves_nothing_behind_even_where_the_property_fails() -> None:
    row = MUTATIONS[0]
    function = function_at(row.target)
    before = function.__code__
    with pytest.raises(RuntimeError), mutated(row.target, row.old, row.new):
        assert function.__code__ is not before
        raise RuntimeError
    assert function.__code__ is before


@pytest.mark.parametrize("old", ["no such text", "r"])
def test_a_row_whose_text_is_not_there_or_there_twice_is_refused(old: str) -> None:
    target: Any = MUTATIONS[0].target
    with pytest.raises(ValueError, match="a mutation needs it once"), mutated(target, old, ""):
        pass
