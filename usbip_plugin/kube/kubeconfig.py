"""Reads a kubeconfig as kubectl does, and says in words why it cannot be used."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from usbip_plugin.clock import Clock
from usbip_plugin.errors import KubeconfigError
from usbip_plugin.kube import lazy_imports

lazy_imports.make_imports_lazy()

from kubernetes_asyncio.client.configuration import Configuration  # noqa: E402
from kubernetes_asyncio.config.config_exception import ConfigException  # noqa: E402

DEFAULT_PATH = "~/.kube/config"
CREDENTIALS_TIMEOUT_S = 300.0
"""Seconds for a credential plugin. It may open a browser and wait for a person."""
MAX_SHOWN = 10
"""Names that an error about an unknown one lists."""


@dataclass(frozen=True, slots=True)
class Kubeconfig:
    """A kubeconfig and what to use of it, as kubectl's flags of the same names. None for what the file says.

    path: one path or several, as in $KUBECONFIG.
    """

    path: str = DEFAULT_PATH
    context: str | None = None
    cluster: str | None = None
    user: str | None = None

    async def load(self, clock: Clock) -> Configuration:
        """Returns the configuration of the API client. Runs a credential plugin if the user has one.

        Raises KubeconfigError.
        """
        # the client of all API objects takes 2 MiB
        with lazy_imports.placeholder("kubernetes_asyncio.client", "ApiClient"):
            from kubernetes_asyncio.config.kube_config import KubeConfigLoader  # noqa: PLC0415 - no pod needs it

        merged = self._read()
        value: dict[str, Any] = merged.value
        name = self.context or value.get("current-context")
        if not name:
            cure = "use --context, or run: kubectl config use-context NAME"
            raise KubeconfigError(f"kubeconfig {self.path} selects no context; {cure}")
        context = self._entry(value, "context", name)["context"]
        for kind, given in (("cluster", self.cluster), ("user", self.user)):
            if given is not None:
                self._entry(value, kind, given)
                context.value[kind] = given
        configuration = Configuration()
        plugin = self._plugin(value, context.safe_get("user"))
        try:
            async with clock.timeout(CREDENTIALS_TIMEOUT_S):
                loader = KubeConfigLoader(config_dict=merged, config_base_path=None, active_context=name)
                await loader.load_and_set(configuration)
        except TimeoutError as error:
            late = f"no answer within {CREDENTIALS_TIMEOUT_S:g} s"
            raise KubeconfigError(f"kubeconfig {self.path}: credential plugin {plugin!r}: {late}") from error
        except FileNotFoundError as error:
            if plugin is None:
                raise KubeconfigError(f"kubeconfig {self.path}: {error.filename}: {error.strerror}") from error
            cure = "install it, or use another --user or --context"
            raise KubeconfigError(f"kubeconfig {self.path}: credential plugin {plugin!r} not found; {cure}") from error
        except ConfigException as error:
            failed = str(error).removeprefix("exec: ")
            what = f"credential plugin {plugin!r} failed" if failed != str(error) else "is not valid"
            raise KubeconfigError(f"kubeconfig {self.path}: {what}: {failed}") from error
        except OSError as error:
            raise KubeconfigError(f"kubeconfig {self.path}: {error.filename}: {error.strerror or error}") from error
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
            raise KubeconfigError(f"kubeconfig {self.path} is not valid: {error}") from error
        if token := configuration.api_key.get("BearerToken"):
            configuration.api_key["BearerToken"] = token.strip()
        return configuration

    def _read(self) -> Any:
        """Returns the merged files as a ConfigNode of the library."""
        from kubernetes_asyncio.config.kube_config import KubeConfigMerger  # noqa: PLC0415

        if not any(Path(part).expanduser().is_file() for part in self.path.split(os.pathsep) if part):
            cure = "use --kubeconfig or KUBECONFIG, or run in a pod"
            raise KubeconfigError(f"kubeconfig {self.path} not found; {cure}")
        try:
            merged = KubeConfigMerger(self.path).config
            for kind in ("clusters", "contexts", "users"):
                for entry in merged.value[kind]:
                    str(entry.value["name"])
        except yaml.YAMLError as error:
            cause = " ".join(str(error).split())
            raise KubeconfigError(f"kubeconfig {self.path} is not valid YAML: {cause}") from error
        except OSError as error:
            raise KubeconfigError(f"kubeconfig {self.path}: {error.strerror or error}") from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            form = "expected a mapping with clusters, contexts and users"
            raise KubeconfigError(f"kubeconfig {self.path} is not valid: {form}") from error
        return merged

    def _entry(self, value: Mapping[str, Any], kind: str, name: str) -> Any:
        entries = {str(entry["name"]): entry for entry in value[f"{kind}s"]}
        if name not in entries:
            names = [*entries][:MAX_SHOWN] + (["..."] if len(entries) > MAX_SHOWN else [])
            known = f"it has {', '.join(names)}" if names else "it has none"
            raise KubeconfigError(f"kubeconfig {self.path} has no {kind} {name!r}; {known}")
        entry = entries[name]
        if not isinstance(entry.value.get(kind), dict):
            raise KubeconfigError(f"kubeconfig {self.path} is not valid: {kind} {name!r} is empty")
        return entry

    def _plugin(self, value: Mapping[str, Any], user: str | None) -> str | None:
        """Returns the command of the credential plugin of a user, None if it has none."""
        for entry in value["users"]:
            about = entry.value.get("user") if entry["name"] == user else None
            if isinstance(about, dict) and isinstance(about.get("exec"), dict):
                return str(about["exec"].get("command"))
        return None
