#!/bin/sh
# One machine: a process for each GPU (or PROCESSES of them; on a CPU set it). A process that dies restarts all of them from
# the newest checkpoint, up to 3 times.
#
#   launch/torchrun.sh recipes/paper/mobillama-0.5b.yaml --train.micro_batch_size 16
set -e
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node="${PROCESSES:-gpu}" --max-restarts=3 \
  -m -- mobillama pretrain "$@"
