// Launches compiled kernels inside TensorRT-RTX: the plugin of every kernel node, for engines that need no Python.
//
//   g++ -std=c++17 -O2 -fPIC -shared -I SDK/include -I CUDA/include kernel_launcher.cpp -o libkernel_launcher.so
//
// SDK is the unpacked TensorRT-RTX of the version that builds the engine, CUDA the toolkit whose cuda_runtime_api.h its
// headers include. Nothing of either is linked: TensorRT calls this library, and the driver is loaded when it is needed.
// `cnx-deploy build-trt --fused --launcher libkernel_launcher.so` puts the library into the engine.
//
// A node says everything by fields; cnx_deploy/exporters/trt/kernel_node.py describes them and is the other reader.

#include <NvInferRuntime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <dlfcn.h>
#include <memory>
#include <string>
#include <vector>

namespace
{

using namespace nvinfer1;

constexpr char const* kNAME = "CompiledKernel";
constexpr char const* kVERSION = "1";
constexpr char const* kNAMESPACE = "cnx_deploy";

// The part of cuda.h that a launch needs. Every call answers 0 where it succeeded.
constexpr int32_t kMAX_DYNAMIC_SHARED_SIZE_BYTES = 8;
constexpr int32_t kMOST_STATIC_SHARED_BYTES = 48 << 10;

struct Driver
{
    int (*loadModule)(void**, void const*) = nullptr;
    int (*unloadModule)(void*) = nullptr;
    int (*getFunction)(void**, void*, char const*) = nullptr;
    int (*setAttribute)(void*, int, int) = nullptr;
    int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**)
        = nullptr;
    bool isThere = false;

    static Driver const& get()
    {
        static Driver const driver;
        return driver;
    }

private:
    Driver()
    {
        void* const library = dlopen("libcuda.so.1", RTLD_NOW);
        isThere = library != nullptr && find(library, "cuModuleLoadData", loadModule)
            && find(library, "cuModuleUnload", unloadModule) && find(library, "cuModuleGetFunction", getFunction)
            && find(library, "cuFuncSetAttribute", setAttribute) && find(library, "cuLaunchKernel", launch);
    }

    template <typename Call>
    static bool find(void* library, char const* name, Call& call)
    {
        call = reinterpret_cast<Call>(dlsym(library, name));
        return call != nullptr;
    }
};

// Four numbers of a field: input, its axes as bits, factor, divisor. factor × the product of the axes ÷ divisor, up.
using Size = int32_t const*;
constexpr size_t kSIZE = 4;

int64_t valueOf(Size size, PluginTensorDesc const* inputs)
{
    int64_t product = size[2];
    for (int32_t axis = 0; axis < Dims::MAX_DIMS; ++axis)
    {
        if ((size[1] >> axis) & 1)
        {
            product *= inputs[size[0]].dims.d[axis];
        }
    }
    return (product + size[3] - 1) / size[3];
}

IDimensionExpr const* expressionOf(Size size, DimsExprs const* inputs, IExprBuilder& builder)
{
    IDimensionExpr const* product = builder.constant(size[2]);
    for (int32_t axis = 0; axis < Dims::MAX_DIMS; ++axis)
    {
        if ((size[1] >> axis) & 1)
        {
            product = builder.operation(DimensionOperation::kPROD, *product, *inputs[size[0]].d[axis]);
        }
    }
    return size[3] == 1 ? product
                        : builder.operation(DimensionOperation::kCEIL_DIV, *product, *builder.constant(size[3]));
}

struct Output
{
    DataType type;
    bool isChannelsLast;
    std::vector<Size> shape;
};

// A kernel and its launch, as the fields say them. The order of the names is that of kernel_node.FIELDS.
struct Node
{
    static constexpr size_t kFIRST_NUMBERS = 2;
    static constexpr char const* kFIELDS[] = {"image", "entry", "launch", "inputs", "outputs", "grid", "arguments"};
    static constexpr size_t kCOUNT = 7;

    std::string image, entry;
    std::vector<int32_t> numbers[kCOUNT]; // of launch, inputs, outputs, grid and arguments
    std::vector<Output> outputs;

    std::vector<int32_t> const& launch() const { return numbers[2]; }
    std::vector<int32_t> const& inputs() const { return numbers[3]; }
    std::vector<int32_t> const& grid() const { return numbers[5]; }
    std::vector<int32_t> const& arguments() const { return numbers[6]; }

    // Reads the fields; false where one is missing or of another length than its reader expects.
    bool read(PluginFieldCollection const& fields)
    {
        bool isThere[kCOUNT] = {};
        for (int32_t index = 0; index < fields.nbFields; ++index)
        {
            PluginField const& field = fields.fields[index];
            for (size_t place = 0; place < kCOUNT; ++place)
            {
                if (std::strcmp(field.name, kFIELDS[place]) != 0)
                {
                    continue;
                }
                isThere[place] = true;
                if (place >= kFIRST_NUMBERS)
                {
                    auto const* first = static_cast<int32_t const*>(field.data);
                    numbers[place].assign(first, first + field.length);
                }
                else
                {
                    (place == 0 ? image : entry).assign(static_cast<char const*>(field.data), field.length);
                }
            }
        }
        entry = entry.c_str(); // the parser ends a text with a zero
        return std::all_of(isThere, isThere + kCOUNT, [](bool there) { return there; }) && launch().size() == 2
            && inputs().size() % 2 == 0 && grid().size() == 3 * kSIZE && arguments().size() % (1 + kSIZE) == 0
            && readOutputs();
    }

    // Type and layout of a tensor, counted over inputs, then outputs.
    bool fits(int32_t position, PluginTensorDesc const& tensor) const
    {
        auto const place = static_cast<size_t>(position);
        size_t const given = inputs().size() / 2;
        DataType const type
            = place < given ? static_cast<DataType>(inputs()[2 * place]) : outputs[place - given].type;
        bool const isChannelsLast
            = place < given ? inputs()[2 * place + 1] != 0 : outputs[place - given].isChannelsLast;
        return tensor.type == type && tensor.format == (isChannelsLast ? TensorFormat::kHWC : TensorFormat::kLINEAR);
    }

private:
    bool readOutputs()
    {
        std::vector<int32_t> const& row = numbers[4];
        for (size_t at = 0; at < row.size();)
        {
            if (at + 3 > row.size() || at + 3 + kSIZE * static_cast<size_t>(row[at + 2]) > row.size())
            {
                return false;
            }
            Output output{static_cast<DataType>(row[at]), row[at + 1] != 0, {}};
            size_t const rank = static_cast<size_t>(row[at + 2]);
            for (size_t axis = 0; axis < rank; ++axis)
            {
                output.shape.push_back(row.data() + at + 3 + kSIZE * axis);
            }
            outputs.push_back(output);
            at += 3 + kSIZE * rank;
        }
        return !outputs.empty();
    }
};

class KernelPlugin final : public IPluginV3,
                           public IPluginV3OneCore,
                           public IPluginV3OneBuild,
                           public IPluginV3OneRuntime
{
public:
    explicit KernelPlugin(std::shared_ptr<Node const> node)
        : mNode(std::move(node))
    {
    }

    ~KernelPlugin() override
    {
        if (mModule != nullptr)
        {
            Driver::get().unloadModule(mModule);
        }
    }

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override
    {
        switch (type)
        {
        case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
        case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    IPluginV3* clone() noexcept override
    {
        return new (std::nothrow) KernelPlugin(mNode); // what is loaded stays with the one that loaded it
    }

    AsciiChar const* getPluginName() const noexcept override
    {
        return kNAME;
    }

    AsciiChar const* getPluginVersion() const noexcept override
    {
        return kVERSION;
    }

    AsciiChar const* getPluginNamespace() const noexcept override
    {
        return kNAMESPACE;
    }

    // --- building ---

    int32_t configurePlugin(
        DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*, int32_t) noexcept override
    {
        return 0;
    }

    int32_t getNbOutputs() const noexcept override
    {
        return static_cast<int32_t>(mNode->outputs.size());
    }

    int32_t getOutputDataTypes(
        DataType* types, int32_t count, DataType const*, int32_t) const noexcept override
    {
        for (int32_t index = 0; index < count; ++index)
        {
            types[index] = mNode->outputs[static_cast<size_t>(index)].type;
        }
        return 0;
    }

    int32_t getOutputShapes(DimsExprs const* inputs, int32_t, DimsExprs const*, int32_t, DimsExprs* outputs,
        int32_t count, IExprBuilder& builder) noexcept override
    {
        for (int32_t index = 0; index < count; ++index)
        {
            std::vector<Size> const& shape = mNode->outputs[static_cast<size_t>(index)].shape;
            outputs[index].nbDims = static_cast<int32_t>(shape.size());
            for (size_t axis = 0; axis < shape.size(); ++axis)
            {
                outputs[index].d[axis] = expressionOf(shape[axis], inputs, builder);
            }
        }
        return 0;
    }

    bool supportsFormatCombination(
        int32_t position, DynamicPluginTensorDesc const* tensors, int32_t, int32_t) noexcept override
    {
        return mNode->fits(position, tensors[position].desc);
    }

    // --- running ---

    // Loads the kernel here and not at its first launch, which may be captured into a graph, where nothing can be loaded.
    int32_t onShapeChange(
        PluginTensorDesc const*, int32_t, PluginTensorDesc const*, int32_t) noexcept override
    {
        return load() ? 0 : -1;
    }

    int32_t enqueue(PluginTensorDesc const* inputDescs, PluginTensorDesc const*, void const* const* inputs,
        void* const* outputs, void*, cudaStream_t stream) noexcept override
    {
        if (!load())
        {
            return -1;
        }
        // A pointer or an int32 for each argument; both fit eight bytes, and the driver copies them before it returns.
        std::vector<int32_t> const& codes = mNode->arguments();
        std::vector<uint64_t> values(codes.size() / (1 + kSIZE));
        std::vector<void*> pointers(values.size());
        for (size_t place = 0; place < values.size(); ++place)
        {
            int32_t const* const code = codes.data() + (1 + kSIZE) * place;
            switch (code[0])
            {
            case 0: values[place] = reinterpret_cast<uint64_t>(inputs[code[1]]); break;
            case 1: values[place] = reinterpret_cast<uint64_t>(outputs[code[1]]); break;
            case 2: values[place] = static_cast<uint32_t>(valueOf(code + 1, inputDescs)); break;
            default: values[place] = 0; break; // a null pointer
            }
            pointers[place] = &values[place];
        }
        unsigned grid[3];
        for (size_t axis = 0; axis < 3; ++axis)
        {
            grid[axis] = static_cast<unsigned>(valueOf(mNode->grid().data() + kSIZE * axis, inputDescs));
        }
        auto const threads = static_cast<unsigned>(mNode->launch()[0]);
        auto const shared = static_cast<unsigned>(mNode->launch()[1]);
        return Driver::get().launch(
            mFunction, grid[0], grid[1], grid[2], threads, 1, 1, shared, stream, pointers.data(), nullptr);
    }

    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override
    {
        return clone();
    }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override
    {
        auto const length = [](size_t size) { return static_cast<int32_t>(size); };
        mFields.clear();
        mFields.emplace_back(Node::kFIELDS[0], mNode->image.data(), PluginFieldType::kINT8, length(mNode->image.size()));
        mFields.emplace_back(Node::kFIELDS[1], mNode->entry.data(), PluginFieldType::kCHAR, length(mNode->entry.size()));
        for (size_t place = Node::kFIRST_NUMBERS; place < Node::kCOUNT; ++place)
        {
            std::vector<int32_t> const& row = mNode->numbers[place];
            mFields.emplace_back(Node::kFIELDS[place], row.data(), PluginFieldType::kINT32, length(row.size()));
        }
        mCollection = {length(mFields.size()), mFields.data()};
        return &mCollection;
    }

private:
    bool load() noexcept
    {
        Driver const& driver = Driver::get();
        if (mFunction != nullptr || !driver.isThere)
        {
            return mFunction != nullptr;
        }
        int32_t const shared = mNode->launch()[1];
        void* function = nullptr;
        if (driver.loadModule(&mModule, mNode->image.data()) != 0
            || driver.getFunction(&function, mModule, mNode->entry.c_str()) != 0
            || (shared > kMOST_STATIC_SHARED_BYTES
                && driver.setAttribute(function, kMAX_DYNAMIC_SHARED_SIZE_BYTES, shared) != 0))
        {
            return false;
        }
        mFunction = function;
        return true;
    }

    std::shared_ptr<Node const> mNode;
    void* mModule = nullptr;
    void* mFunction = nullptr;
    std::vector<PluginField> mFields;
    PluginFieldCollection mCollection{};
};

class KernelCreator final : public IPluginCreatorV3One
{
public:
    KernelCreator()
    {
        for (size_t place = 0; place < Node::kCOUNT; ++place)
        {
            PluginFieldType const type = place == 0 ? PluginFieldType::kINT8
                : place == 1                        ? PluginFieldType::kCHAR
                                                    : PluginFieldType::kINT32;
            mFields.emplace_back(Node::kFIELDS[place], nullptr, type, 0);
        }
        mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
    }

    IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const* fields, TensorRTPhase) noexcept override
    {
        try
        {
            auto node = std::make_shared<Node>();
            return fields != nullptr && node->read(*fields) ? new KernelPlugin(std::move(node)) : nullptr;
        }
        catch (std::exception const&)
        {
            return nullptr;
        }
    }

    PluginFieldCollection const* getFieldNames() noexcept override
    {
        return &mCollection;
    }

    AsciiChar const* getPluginName() const noexcept override
    {
        return kNAME;
    }

    AsciiChar const* getPluginVersion() const noexcept override
    {
        return kVERSION;
    }

    AsciiChar const* getPluginNamespace() const noexcept override
    {
        return kNAMESPACE;
    }

private:
    std::vector<PluginField> mFields;
    PluginFieldCollection mCollection{};
};

} // namespace

// What TensorRT looks for in a library of plugins.
extern "C" __attribute__((visibility("default"))) IPluginCreatorInterface* const* getCreators(int32_t& count)
{
    static KernelCreator creator;
    static IPluginCreatorInterface* const creators[] = {&creator};
    count = 1;
    return creators;
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(ILoggerFinder*) {}
