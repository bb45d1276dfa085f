"""Two hops between nodes: see two_hop_ranks.py."""

from tests.models.expert_parallel.two_hop_ranks import check_equal_to_one_hop, check_layers


def test_two_hops_of_eight_ranks_equal_one_process(ranks):
    ranks.run(8, check_layers, 4)


def test_losses_and_gradients_of_sixteen_ranks_on_four_nodes_equal_those_of_one_hop(ranks):
    ranks.run(16, check_equal_to_one_hop, 4)
