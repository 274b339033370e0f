"""BEVFusion at full size, on models of either framework."""


def choose_alike(reference, model):
    """Has ``model`` choose its proposals by the heatmap of ``reference``, which has to run first.

    Of 324,000 scores two that are next to each other differ by less than a sum in another order does.
    """
    kept = []
    hook = reference.register_forward_hook(lambda module, args, output: kept.append(output.clone()))
    return [hook, model.register_forward_hook(lambda module, args, output: kept[-1].clone())]
