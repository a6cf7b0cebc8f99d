"""The config of a run: frozen values, read from YAML and checked before anything starts."""

from megahybrid.config.base import dump, dump_yaml
from megahybrid.config.check import check_run
from megahybrid.config.loader import load
from megahybrid.config.parsing import parse, parse_json
from megahybrid.config.run import RunConfig

__all__ = ["RunConfig", "check_run", "dump", "dump_yaml", "load", "parse", "parse_json"]
