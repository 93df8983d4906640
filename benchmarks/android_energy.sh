#!/bin/sh
# Charge that a command on an Android phone takes, in mAh for 1,000 tokens, from the battery's own counter.
#
#   sh benchmarks/android_energy.sh TOKENS 'COMMAND ON THE PHONE'
#   sh benchmarks/android_energy.sh 2000 '/data/local/tmp/llama-bench -m /data/local/tmp/m.gguf -p 0 -n 2000 -r 1'
#
# A cable charges the phone: connect over Wi-Fi (adb tcpip 5555; adb connect ADDRESS), unplug, full brightness off, aeroplane
# mode but Wi-Fi on. Counters step by 1 mAh or more: let the command run for minutes. The idle phone's charge over the same
# time is measured afterwards and taken off.
set -eu
tokens=$1 command=$2

charge() { # µAh left
  adb shell dumpsys battery | sed -n 's/.*Charge counter: *\([0-9]*\).*/\1/p'
}

[ -n "$(charge)" ] || { echo "this phone tells no charge counter (adb shell dumpsys battery)" >&2; exit 1; }
adb shell dumpsys battery | grep -q 'powered: true' && { echo "unplug the phone first" >&2; exit 1; }
before=$(charge) started=$(date +%s)
adb shell "$command"
spent=$((before - $(charge))) seconds=$(($(date +%s) - started))
before=$(charge)
sleep "$seconds"
idle=$((before - $(charge)))
awk -v spent="$spent" -v idle="$idle" -v tokens="$tokens" -v seconds="$seconds" 'BEGIN {
  printf "%d s: %.2f mAh with the command, %.2f mAh idle: %.2f mAh for 1,000 tokens\n",
    seconds, spent / 1000, idle / 1000, (spent - idle) / tokens }'
