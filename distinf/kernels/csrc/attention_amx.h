#pragma once
#include "kernel_table.h"

namespace distinf {

// attention of KernelTable with the products of large tiles on AMX. The caller has checked isa_available(Isa::kAmx).
void attention_amx(const Worker& w, const AttentionArgs& args, const CacheArgs& cache, const BatchArgs& batch);

}  // namespace distinf
