#include "dev/emulator/translated.h"

#include <dlfcn.h>
#include <elf.h>

#include <cstdint>
#include <fstream>
#include <iterator>
#include <map>
#include <regex>
#include <stdexcept>
#include <string>
#include <vector>

namespace flash_attn::emulator {
namespace {

std::map<std::string, TranslatedKernel>& translations() {
  static std::map<std::string, TranslatedKernel> by_name;
  return by_name;
}

// Symbols as g++ writes them: nvcc names a file's unnamed namespace after the file, and keeps the zeros at the end of a
// constant object in a template's arguments.
std::string as_gxx_names(std::string symbol) {
  static const std::regex unnamed("[0-9]+_GLOBAL__N__[0-9a-f]{8}_[0-9]+_[0-9A-Za-z_]*?_cu_[0-9a-f]{8}");
  static const std::regex zeros("(L(NS_[0-9]+[A-Za-z]+E|[a-z])0E)+E");
  symbol = std::regex_replace(symbol, unnamed, "12_GLOBAL__N_1");
  for (std::string longer; longer != symbol;) {
    longer = symbol;
    symbol = std::regex_replace(symbol, zeros, "E");
  }
  return symbol;
}

// Those of the module's file by address, of functions that it doesn't export, too.
std::map<uint64_t, std::string> read_symbols(const char* file_name) {
  std::ifstream stream(file_name, std::ios::binary);
  const std::vector<char> file{std::istreambuf_iterator<char>(stream), {}};
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(file.data());
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(file.data() + header->e_shoff);
  std::map<uint64_t, std::string> symbols;
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const auto* first = reinterpret_cast<const Elf64_Sym*>(file.data() + sections[i].sh_offset);
    const char* names = file.data() + sections[sections[i].sh_link].sh_offset;
    for (size_t n = 0; n < sections[i].sh_size / sizeof(Elf64_Sym); ++n) {
      if (ELF64_ST_TYPE(first[n].st_info) == STT_FUNC) symbols[first[n].st_value] = names + first[n].st_name;
    }
  }
  return symbols;
}

std::string symbol_of(const void* function) {
  Dl_info module;
  dladdr(function, &module);
  static const std::map<uint64_t, std::string> symbols = read_symbols(module.dli_fname);
  const auto address = reinterpret_cast<uint64_t>(function) - reinterpret_cast<uint64_t>(module.dli_fbase);
  const auto found = symbols.find(address);
  return found == symbols.end() ? "" : as_gxx_names(found->second);
}

}  // namespace

Translation::Translation(const char* symbol, const TranslatedKernel& kernel) {
  translations()[as_gxx_names(symbol)] = kernel;
}

const TranslatedKernel* find_translated(const void* kernel) {
  if (translations().empty()) return nullptr;
  const auto found = translations().find(symbol_of(kernel));
  if (found == translations().end()) throw std::runtime_error("a kernel without translation: " + symbol_of(kernel));
  return &found->second;
}

}  // namespace flash_attn::emulator
