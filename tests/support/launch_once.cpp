// Loads a library of plugins as TensorRT does, makes its plugin of the fields that are given and launches it once.
//
// usage: launch_once LIBRARY NAME=HEX ...; prints the fields that the plugin keeps and the formats that it takes.
// Exit code 3: the creator makes no plugin of the fields.

#include <NvInferRuntime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <string>
#include <vector>

using namespace nvinfer1;

static PluginTensorDesc described(std::vector<int64_t> const& shape, DataType type, TensorFormat format)
{
    PluginTensorDesc tensor{};
    tensor.dims.nbDims = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), tensor.dims.d);
    tensor.type = type;
    tensor.format = format;
    return tensor;
}

int main(int count, char** words)
{
    void* const library = dlopen(words[1], RTLD_NOW);
    auto const getCreators
        = reinterpret_cast<IPluginCreatorInterface* const* (*) (int32_t&)>(dlsym(library, "getCreators"));
    int32_t creators = 0;
    auto* const creator = static_cast<IPluginCreatorV3One*>(getCreators(creators)[0]);

    std::vector<std::string> names, values;
    for (int index = 2; index < count; ++index)
    {
        char const* const sign = std::strchr(words[index], '=');
        names.emplace_back(words[index], static_cast<size_t>(sign - words[index]));
        values.emplace_back();
        for (char const* digits = sign + 1; *digits; digits += 2)
        {
            values.back().push_back(static_cast<char>(std::stoi(std::string(digits, 2), nullptr, 16)));
        }
    }
    std::vector<PluginField> fields;
    for (size_t place = 0; place < names.size(); ++place)
    {
        bool const isText = names[place] == "image" || names[place] == "entry";
        PluginFieldType const type = isText ? PluginFieldType::kINT8 : PluginFieldType::kINT32;
        auto const length = static_cast<int32_t>(values[place].size() / (isText ? 1 : 4));
        fields.emplace_back(names[place].c_str(), values[place].data(), type, length);
    }
    PluginFieldCollection const given{static_cast<int32_t>(fields.size()), fields.data()};
    IPluginV3* const made = creator->createPlugin("node", &given, TensorRTPhase::kRUNTIME);
    if (made == nullptr)
    {
        return 3;
    }
    auto* const build = static_cast<IPluginV3OneBuild*>(made->getCapabilityInterface(PluginCapabilityType::kBUILD));
    std::string formats;
    for (int32_t position = 0; position < 4; ++position)
    {
        for (TensorFormat const format : {TensorFormat::kLINEAR, TensorFormat::kHWC})
        {
            DynamicPluginTensorDesc tensors[4]{};
            DataType const type = position == 1 ? DataType::kFLOAT : DataType::kHALF;
            tensors[position].desc = described({1, 1, 1, 1}, type, format);
            if (build->supportsFormatCombination(position, tensors, 2, 2))
            {
                formats += std::to_string(position) + (format == TensorFormat::kHWC ? "HWC" : "LINEAR");
            }
        }
    }
    std::printf("formats=%s\n", formats.c_str());

    auto* run = static_cast<IPluginV3OneRuntime*>(made->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    PluginFieldCollection const* const kept = run->getFieldsToSerialize();
    for (int32_t index = 0; index < kept->nbFields; ++index)
    {
        PluginField const& field = kept->fields[index];
        size_t const size = static_cast<size_t>(field.length) * (field.type == PluginFieldType::kINT32 ? 4 : 1);
        std::printf("%s=", field.name);
        for (size_t place = 0; place < size; ++place)
        {
            std::printf("%02x", static_cast<unsigned char const*>(field.data)[place]);
        }
        std::printf("\n");
    }

    IPluginV3* const attached = run->attachToContext(nullptr);
    run = static_cast<IPluginV3OneRuntime*>(attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    PluginTensorDesc const inputs[] = {described({3, 40, 56, 56}, DataType::kHALF, TensorFormat::kHWC),
        described({3, 160}, DataType::kFLOAT, TensorFormat::kLINEAR)};
    void const* const from[] = {reinterpret_cast<void*>(0xa0), reinterpret_cast<void*>(0xb0)};
    void* const to[] = {reinterpret_cast<void*>(0xd0), reinterpret_cast<void*>(0xe0)};
    int const failed = run->onShapeChange(inputs, 2, nullptr, 2)
        || run->enqueue(inputs, nullptr, from, to, nullptr, reinterpret_cast<cudaStream_t>(5));
    delete attached;
    delete made;
    return failed;
}
