"""The learner: gradients of one optimizer step, and the step.

    L = w_fm * mean(L_fm) - sum_r w_r * mean(r(decode(clean_hat)))            (USO section 3: L_pre + lambda * L_SRL)

Shape suffixes: B batch, L latent tokens, C channels per token, H and W pixels.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from rewardgen.errors import CheckpointError, ConfigError, NonFiniteError
from rewardgen.flow.loss import draw_times_and_noise, flow_matching_loss
from rewardgen.flow.window import WindowConfig, run_window
from rewardgen.gradients import TermGradients, combine
from rewardgen.objective import FLOW_MATCHING, Objective, TermSum, masked_sum
from rewardgen.policy import Policy
from rewardgen.reward import score
from rewardgen.rollout import Precision, Weights, device_of, velocity_fn
from rewardgen.settings import Settings
from rewardgen.types import Example, Rollout, StepReport
