"""Run under torchrun: the gradients of a model whose experts are split over the ranks, against those of a whole one.

usage: expert_worker.py EXPERTS, the back end of the experts. Every rank runs the whole model on all rows, and the split
one on its own rows; one rank's rows go to the experts of one rank alone, so that the other gets no pair from it.
"""

import sys
from functools import partial

import torch
import torch.distributed as dist

from ernie_elastic.data.packed.packing import collate
from ernie_elastic.modeling.back_ends import choose_experts_back_end
from ernie_elastic.schema import SubModelSpec
from ernie_elastic.training.configuration import TrainingConfig
from ernie_elastic.training.engines.base import LossModule
from ernie_elastic.training.engines.expert_parallel import ExpertParallel
from ernie_elastic.training.ranks import group, rank, world_size
from tests.distributed.train_worker import rows_of
from tests.modeling.common import RICH, tiny_model


def model_of(back_end):
    model = tiny_model(initializer_range=0.05, **RICH).train()
    choose_experts_back_end(model, back_end)
    return model


def check(back_end: str, spec: SubModelSpec | None) -> None:
    ranks, training = world_size(), TrainingConfig(engine="torch", expert_parallel=world_size())
    whole, split = model_of(back_end), model_of(back_end)
    spec = spec or whole.config.full_spec()
    experts = ExpertParallel(split, training, torch.device("cpu"))
    rows, weights = rows_of(0, whole.config, 0, 2 * ranks), training.loss_weights.vector()
    length = max(len(document) for row in rows for document in row)
    # Every rank counts all rows, so `combine` divides by `ranks` times the targets, and multiplies by `ranks`.
    loss, result = LossModule(whole, ranks)(collate(rows, length), spec, weights)
    loss.backward()
    own = rows[2 * rank() : 2 * rank() + 2]
    loss, shared = LossModule(split, ranks, None, 0.0, experts.shard)(collate(own, length), spec, weights)
    loss.backward()
    torch.testing.assert_close(shared.sums, result.sums / ranks)
    dense = dict(split.named_parameters())
    for name, parameter in whole.named_parameters():
        expected = parameter.grad
        if name in experts.masters:
            share = len(expected) // ranks
            expected, gradient = expected[rank() * share : (rank() + 1) * share], experts.masters[name].grad
            gradient = torch.zeros_like(expected) if gradient is None else gradient / ranks
        else:
            gradient = dense[name].grad
            dist.all_reduce(gradient)
            gradient = gradient / ranks
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6, msg=partial("{} {}".format, name))
    whole_norm = torch.nn.utils.get_total_norm([p.grad for p in whole.parameters()])
    dense_norm = torch.nn.utils.get_total_norm([p.grad / ranks for p in dense.values()])
    torch.testing.assert_close(experts.total_norm(dense_norm), whole_norm, rtol=1e-4, atol=0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with group(60):
        check(sys.argv[1], None)
        config = model_of(sys.argv[1]).config
        check(sys.argv[1], SubModelSpec((0, 3, 4, 5), ((0, 1, 2),) * 4, 1))  # all kept experts lie on rank 0
