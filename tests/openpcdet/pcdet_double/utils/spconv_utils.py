"""What OpenPCDet knows of spconv."""

import spconv.pytorch as spconv


def find_all_spconv_keys(model, prefix=''):
    """Names of the weights of all sparse convolutions."""
    names = (n for n, m in model.named_modules() if isinstance(m, spconv.conv.SparseConvolution))
    return {f'{prefix}.{name}.weight'.lstrip('.') for name in names}


def replace_feature(out, new_features):
    return out.replace_feature(new_features)
