"""Flax models: those of the papers on sparse training and pruning, and a transformer."""

from jaxsparse.models.alexnet import AlexNet
from jaxsparse.models.batch_stats import reestimate_batch_stats
from jaxsparse.models.channels import channel_groups, slim
from jaxsparse.models.conv_n import Conv2, Conv4, Conv6, ConvN
from jaxsparse.models.densenet import DenseNet, DenseNet40
from jaxsparse.models.folding import fold_batch_norm
from jaxsparse.models.generation import generate
from jaxsparse.models.gpt import GPT
from jaxsparse.models.lenet import LeNet5Caffe, LeNet300100
from jaxsparse.models.mlp import MLP
from jaxsparse.models.resnet import ResNet8, ResNet18, ResNet20, ResNet34, ResNet50, ResNet56, ResNetCIFAR
from jaxsparse.models.vgg import VGG
from jaxsparse.models.wide_resnet import WideResNet

__all__ = [
    "GPT",
    "MLP",
    "VGG",
    "AlexNet",
    "Conv2",
    "Conv4",
    "Conv6",
    "ConvN",
    "DenseNet",
    "DenseNet40",
    "LeNet5Caffe",
    "LeNet300100",
    "ResNet8",
    "ResNet18",
    "ResNet20",
    "ResNet34",
    "ResNet50",
    "ResNet56",
    "ResNetCIFAR",
    "WideResNet",
    "channel_groups",
    "fold_batch_norm",
    "generate",
    "reestimate_batch_stats",
    "slim",
]
