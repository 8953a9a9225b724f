#!/bin/sh
# Generates usbip_plugin/kubelet/*_pb2.py, *_pb2.pyi and *_pb2_grpc.py from the .proto files beside this script.
# usage: generate.sh [OUTPUT_ROOT]     OUTPUT_ROOT defaults to the repository; PYTHON to python3 (needs grpcio-tools 1.76)
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
out=${1:-$(dirname -- "$here")}
# Mapping the folder onto the package path makes protoc write imports that resolve inside the package.
"${PYTHON:-python3}" -m grpc_tools.protoc "-Iusbip_plugin/kubelet=$here" \
    "--python_out=$out" "--pyi_out=$out" "--grpc_python_out=$out" \
    usbip_plugin/kubelet/deviceplugin.proto usbip_plugin/kubelet/podresources.proto
# The stubs leave out type arguments, which strict checking would report.
for stub in deviceplugin podresources; do
    file="$out/usbip_plugin/kubelet/${stub}_pb2.pyi"
    { echo '# mypy: disable-error-code="type-arg"'; cat "$file"; } >"$file.tmp"
    mv "$file.tmp" "$file"
done
